"""SPO and DPO on preference pairs of your own, with a pretrained language model."""
