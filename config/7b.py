"""
The paper's 7B. Name it after a stage's own file, and shard it over GPUs:
accelerate launch --config_file config/accelerate/8gpu_fsdp.yaml train.py config/stage1.py config/7b.py

Cost: not run here; by arithmetic in reference/real_sizes.md. Of the state of stage 1 each of 8 GPUs holds
15.9 GB; 17.6 GB of whole bf16 weights come on top during validation. With --lora_rank 16 stage 1 fits on one
card of 80 GB.
"""
llm = "hf:Qwen/Qwen2.5-7B-Instruct"
recompute = True
