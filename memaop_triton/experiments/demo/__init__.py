"""One network trained densely, with `ratio="auto"` and with fixed ratios, side by side.

`mlp` and `finetune` say what is trained, `training` how, `gradients` times the weight gradients,
and `report` and `figure` show the results.
"""
