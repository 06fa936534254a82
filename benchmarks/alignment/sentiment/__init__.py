"""The alignment experiment on a pretrained language model: short reviews, judged by VADER."""
