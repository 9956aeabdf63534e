"""Brain MRI clients: tumor or none."""
