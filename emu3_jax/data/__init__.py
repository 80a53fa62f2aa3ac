"""Token data: pictures and clips with texts to prepared records, records to sequences, sequences to batches."""
