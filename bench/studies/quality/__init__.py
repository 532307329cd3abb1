"""The study of learning quality: what sampled weight gradients cost in accuracy.

`tasks` and `schemes` define what is compared, `training` trains one run, `store` keeps it, `report`
makes the page of it. `python -m bench.studies.quality --help` lists the commands.
"""
