"""State what options of runs mean, once for the command line, recipes and Prefect's forms; imports nothing."""

STORE = "folder or s3://bucket/prefix of the artifacts; not given: $SFTOK_STORE, or ./store"
DATA = (
    "images, local or on S3: a folder of class folders, tar shards, Parquet, or an index of paths; folder:, "
    "webdataset:, parquet: or index: before it says which; not given: the recipe's own"
)
OVERRIDES = "settings to change, as section.field=value"
SEED = "seed of everything random; not given: the recipe's"
WORKERS = "Ray workers; 0: none, all in one process; not given: 2, or the cores if fewer"
GPUS_PER_WORKER = "GPUs of a Ray worker; 0.5 lets two share one; not given: 1 where there are GPUs"
RANKS = (
    "training processes, with a GPU each on CUDA; they share a step's micro-batches. A range, such as 2:8, takes as "
    "many of them as there is room for, and goes on with fewer when a machine is lost"
)
DEVICE = (
    "device to compute on: cpu; cuda: a GPU for each worker and rank; or auto: cuda if this machine, or the Ray "
    "cluster to join, has one; results of the two have digests of their own"
)
ANEW = "give up unfinished shards that another kind of device began, and begin them anew"
OVERLAP = "what a second run of the same recipe on the same store does while the first is under way"


def sentence(text: str) -> str:
    """Return a description as a sentence: with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."
