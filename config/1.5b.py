"""
The paper's 1.5B. Name it after a stage's own file: accelerate launch train.py config/stage1.py config/1.5b.py

Cost: not run here; by arithmetic in reference/real_sizes.md.
"""
llm = "hf:Qwen/Qwen2.5-1.5B-Instruct"
