"""Sources whose weights are quantised: which formats are read, how weights are dequantised, and what OUT says of it.

The attention of such a source is dequantised and converted. All other tensors go into OUT byte for byte.
"""
