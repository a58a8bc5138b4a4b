"""sppo-ray: Self-Play Preference Optimization (Wu et al., ICLR 2025) on Ray, vLLM, PairRM and DeepSpeed.

`sppo_ray` is the algorithm and everything pure; it imports neither ray, vllm nor deepspeed.
`actors` (beside it) turns a config into Ray processes.
"""

__version__ = "0.1.0"
