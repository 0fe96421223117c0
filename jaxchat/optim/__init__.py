"""The optimizer: Muon for the blocks' matrices, AdamW for embedding and head, and their schedules."""
