"""Methods side by side: the same dense networks, data, targets and fine-tuning; ours and those of other libraries."""
