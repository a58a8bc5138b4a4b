"""The embedded tiny default: a toy question-answering world, in which SPPO runs in minutes on two cores.

`domain` holds the world (facts, prompts, the grammar of answers), `oracle` the known rule for how good an answer is,
`models` the tokenizers and architectures, `training` how the base policy and the judge learn.
`scripts/make_tiny_assets.py` puts them together and writes `sppo_ray/assets/`. Because the oracle is known, a run can
tell a better policy from one that only pleases its judge.
"""
