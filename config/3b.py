"""
The paper's 3B. Name it after a stage's own file: accelerate launch train.py config/stage1.py config/3b.py

Cost: not run here. By arithmetic stage 1 takes 54.2 GB plus activations.
"""
llm = "hf:Qwen/Qwen2.5-3B-Instruct"
