"""
The paper's 14B. Name it after a stage's own file, and shard it over 8 GPUs:
accelerate launch --config_file config/accelerate/8gpu_fsdp.yaml train.py config/stage1.py config/14b.py

Cost: not run here. By arithmetic stage 1 holds 241.5 GB of weights, gradients and optimizer state, 30.2 GB on
each of 8 GPUs; activations come on top, and 32.0 GB of whole bf16 weights during validation. The first
process reads the weights: about 65 GB of host memory on its machine, by arithmetic.
"""
llm = "hf:Qwen/Qwen2.5-14B-Instruct"
recompute = True
