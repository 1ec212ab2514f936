"""
The paper's 3B. Name it after a stage's own file: accelerate launch train.py config/stage1.py config/3b.py

Cost: not run here; by arithmetic in reference/real_sizes.md. For stage 1 on one card of 24 GB add
--lora_rank 16 --recompute.
"""
llm = "hf:Qwen/Qwen2.5-3B-Instruct"
