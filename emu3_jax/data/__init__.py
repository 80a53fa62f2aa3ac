"""Training data: pictures and clips with texts become prepared records, then token sequences, then batches."""
