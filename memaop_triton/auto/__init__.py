"""`ratio="auto"`: the library decides which layers sample their gradients, by what it measures.

Every layer starts exact, as an `nn.Linear`. From one step of the optimizer to the next a controller

1. observes three steps (5, 9 and 13): how large the gradients are, D = ‖dW‖², and what variance V
   each number of rows would add;
2. times the layers' gradients at their shapes, exact and sampled, some 50 ms a shape;
3. looks for the choice that makes most of dense's progress per second,
   E = (T_exact / T) · D/(D + V), which predicts the progress of trainings (docs/quality.md);
4. where E is above 1.02 with a confidence of 90 %, takes four windows of eight or nine steps,
   sampled and exact in turn, and keeps the choice if the measured times confirm it;
5. reviews the decision after 100 steps, and ever more rarely where nothing was to be changed.

`model_report(model)` says what was decided and why, and so does the logger `memaop_triton.auto`
(level INFO) when a decision changes. `auto_freeze(model)` ends it; as decisions hang on measured
times, two runs may decide differently before. `memory_state_dict` saves decisions. Steps are those
of the `torch.optim.Optimizer` that holds the first trainable weight.

The processes of a data-parallel run (`DistributedDataParallel`, `fully_shard`) decide alike, by the
mean of their gradients and times. They exchange these at the end of the first step, of observed
steps, and of those with a decision, so all processes of the group (`convert_(process_group=)`, all
by default) have to convert the same layers and take the same number of steps, and to load, freeze
and copy alike. Layers that tensor parallelism divides stay exact. A copy of a model
(`copy.deepcopy`, pickling) goes on from the same decisions, and is decided about by itself where an
optimizer trains it; an average of weights that no optimizer steps stays as it is.
"""
