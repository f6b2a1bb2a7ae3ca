"""NNI: what its users rank channels by, behind our interface. NNI itself is imported when it is used."""
