"""Steering: make a pretrained language or vision-language model look at the right thing, without training it."""
