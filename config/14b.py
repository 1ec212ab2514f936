"""
The paper's 14B. Name it after a stage's own file, and shard it over 8 GPUs:
accelerate launch --config_file config/accelerate/8gpu_fsdp.yaml train.py config/stage1.py config/14b.py

Cost: not run here; by arithmetic in reference/real_sizes.md. Of the state of stage 1 each of 8 GPUs holds
30.2 GB; 32.0 GB of whole bf16 weights come on top during validation. The first process reads the weights:
about 65 GB of host memory on its machine. With --lora_rank 16 stage 1 fits on one card of 80 GB.
"""
llm = "hf:Qwen/Qwen2.5-14B-Instruct"
recompute = True
