"""Converts GQA and MHA models to Multi-head Latent Attention; :mod:`mla_converters.api` is for programs."""
