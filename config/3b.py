"""
The 3B of the paper, after a stage's own file: accelerate launch train.py config/stage1.py config/3b.py. Not run here.
"""
llm = "Qwen/Qwen2.5-3B-Instruct"
micro_tokens = 4096
