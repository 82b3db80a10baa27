"""Files: atomic writes, JSON, and arrays that other libraries wrote.

Safetensors and pickles of torch are read without torch.
"""
