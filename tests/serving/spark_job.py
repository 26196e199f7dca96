"""A batch over Spark: ``spark_job.py MODEL IN OUT`` answers the samples of a JSON file by a registered model, on two local workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(address: str, given: str, out: str) -> None:
    import mlflow.pyfunc
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import spark_partition_id, struct

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
        table = table.repartition(2, "task", "dialogue").sortWithinPartitions(
            "dialogue", "turn"
        )  # histories stay together
        answer = mlflow.pyfunc.spark_udf(spark, address, env_manager="local")
        answered = table.select(answer(struct(*names)).alias("answer"), spark_partition_id().alias("part")).collect()
        found = {
            "partitions": len({row["part"] for row in answered}),
            "rows": [row["answer"].asDict(recursive=True) for row in answered],
        }
        Path(out).write_text(json.dumps(found))
    finally:
        spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
