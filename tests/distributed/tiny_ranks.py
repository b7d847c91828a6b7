"""The words of a command line that make a run of several processes one of seconds."""

TINY = (
    "batch_size=8",
    "device=cpu",
    "encoder.image_size_px=8",
    "encoder.dim=8",
    "bank.num_neighbours=2",
    "loss.num_background=16",
    "loss.steps=2",
    "loss.num_positives=4",
    "loss.warmup_epochs=1",
    "monitor.every_epochs=1000",
    "distributed.timeout_s=20",
    "export.variants=[]",
)
