"""How a decode's context is split among programs of a CUDA device, and its parts joined: `triton.py`."""
