"""Reading GGUF files tensor by tensor, under the names and in the layout of a Hugging Face checkpoint.

The ``gguf`` package names the formats and dequantises. It does not read the files, because its reader makes an array
of each string: for the 303,000 strings of Qwen2.5's tokenizer that took 13 seconds and half a gigabyte.
"""
