"""One layer that is to be planned."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from memaop_triton.auto.layer_timing import Use
from memaop_triton.config import MemAOPConfig
from memaop_triton.nn.layer_choice import quoted
from memaop_triton.plan.result import LayerPlan, Verdict


class LayerRequest(NamedTuple):
    """What is known of a layer before anything is measured.

    Attributes:
        name: Qualified name in the model.
        in_features: N.
        out_features: P.
        config: What it would be converted with.
        uses: What its backward passes in a step compute, and how often each occurs.
    """

    name: str
    in_features: int
    out_features: int
    config: MemAOPConfig
    uses: Counter[Use]

    def row(self, verdict: Verdict, **found: Any) -> LayerPlan:
        """What was found out; the keywords are fields of `LayerPlan`."""
        uses = self.uses
        return LayerPlan(
            name=self.name,
            rows=tuple(sorted({use.rows for use in uses})),
            in_features=self.in_features,
            out_features=self.out_features,
            dtypes=tuple(sorted({str(use.dtype).removeprefix("torch.") for use in uses})),
            calls=uses.total(),
            config=self.config,
            verdict=verdict,
            **found,
        )

    def nothing_to_gain(self) -> str:
        """Why the layer need not be measured, or "" if it must be.

        Raises:
            ValueError: It is on a device where nothing can be measured.
        """
        for use in self.uses:
            if use.device.type not in ("cpu", "cuda"):
                raise ValueError(
                    f"layer {quoted(self.name)} works on device {str(use.device)!r}: move the "
                    "model to a CPU or a GPU, to be measured there."
                )
        config, uses = self.config, self.uses
        if not uses:
            return "no gradient in this step"
        if all(use.rows * use.in_features * use.out_features == 0 for use in uses):
            return "empty"
        if config.grad_input is None and not any(use.needs_weight for use in uses):
            return "weight is frozen"
        if config.is_auto or config.row_memory is not None:
            return ""
        sizes = [(u.rows, u.in_features, u.out_features) for u in uses]
        return "K = M" if all(config.num_rows(*size) == size[0] for size in sizes) else ""
