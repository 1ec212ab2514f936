"""
The 1.5B of the paper, after a stage's own file: accelerate launch train.py config/stage1.py config/1.5b.py. Not run here.
"""
llm = "Qwen/Qwen2.5-1.5B-Instruct"
