"""
The paper's 7B. Name it after a stage's own file, and shard it over 8 GPUs:
accelerate launch --config_file config/accelerate/8gpu_fsdp.yaml train.py config/stage1.py config/7b.py

Cost: not run here. By arithmetic stage 1 holds 126.9 GB of weights, gradients and optimizer state, 15.9 GB on
each of 8 GPUs; activations come on top, and 17.6 GB of whole bf16 weights during validation.
"""
llm = "hf:Qwen/Qwen2.5-7B-Instruct"
recompute = True
