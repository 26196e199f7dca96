"""A batch over Spark: ``spark_job.py BLOCK IN OUT`` runs the code in a file on a table of the samples in another, on two local workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(block: str, given: str, out: str) -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import spark_partition_id

    samples = json.loads(Path(given).read_text())
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.memory", "1g")
        .getOrCreate()
    )
    try:
        columns = "id string, text string, task string, speaker string, dialogue string, turn long"
        arrays = "audio array<array<double>>, video array<array<double>>"
        names = [part.split()[0] for part in f"{columns}, {arrays}".split(", ")]
        rows = [tuple(sample.get(name) for name in names) for sample in samples]
        table = spark.createDataFrame(rows, f"{columns}, {arrays}")
        table = table.repartition(2, "task", "dialogue").sortWithinPartitions("dialogue", "turn")
        scope = {"spark": spark, "table": table}
        exec(Path(block).read_text(), scope)  # of the page of docs
        found = {
            "partitions": table.select(spark_partition_id()).distinct().count(),
            "rows": [row.asDict(recursive=True) for row in scope["answered"].collect()],
        }
        Path(out).write_text(json.dumps(found))
    finally:
        spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
