"""Results that the authors of the paper published, to compare with.

Source: the result files of github.com/HernandezEduin/Mem-AOP-GD, energy data, 10 runs a scheme.
"""

from __future__ import annotations

from memaop_triton.experiments.numbers import Value
from memaop_triton.experiments.paper import Scheme

RUNS = 10
EPOCHS = 100

#: Validation loss after the last of `EPOCHS` epochs, figure 3.
ENERGY = {
    Scheme("dense", "none", None): Value(9.16931, 0.05493),
    Scheme("topk", "residual", 18): Value(9.51740, 0.29015),
    Scheme("topk", "residual", 9): Value(9.88373, 0.49424),
    Scheme("topk", "residual", 3): Value(10.38197, 1.42370),
    Scheme("topk", "none", 18): Value(11.39789, 0.19074),
    Scheme("topk", "none", 9): Value(11.41838, 0.21858),
    Scheme("topk", "none", 3): Value(26.61184, 0.48929),
    Scheme("weightedk", "residual", 18): Value(9.30213, 0.27358),
    Scheme("weightedk", "residual", 9): Value(9.75628, 0.82745),
    Scheme("weightedk", "residual", 3): Value(10.79295, 1.73473),
    Scheme("weightedk", "none", 18): Value(10.62459, 0.13329),
    Scheme("weightedk", "none", 9): Value(11.60270, 0.21301),
    Scheme("weightedk", "none", 3): Value(33.19110, 1.63428),
    Scheme("randk", "residual", 18): Value(9.65826, 0.65862),
    Scheme("randk", "residual", 9): Value(9.88249, 1.08480),
    Scheme("randk", "residual", 3): Value(32.38590, 16.95875),
    Scheme("randk", "none", 18): Value(14.64730, 0.37862),
    Scheme("randk", "none", 9): Value(25.82613, 1.17842),
    Scheme("randk", "none", 3): Value(61.97715, 3.87408),
}
