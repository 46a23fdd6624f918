"""Hosts a teacher: tokens in, compressed logit tensors out."""
