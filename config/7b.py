"""
The 7B of the paper, after a stage's own file: accelerate launch
--config_file config/accelerate/8gpu_fsdp.yaml train.py config/stage1.py config/7b.py. Not run here.
"""
llm = "Qwen/Qwen2.5-7B-Instruct"
micro_tokens = 4096
recompute = True
