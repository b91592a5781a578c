"""Trained models applied to Spark DataFrames. Runs in: the driver.

::

    from horovodrunner.inference import Model, predict, predict_udf

    model = Model.from_torch(net)
    score = predict_udf(model, return_type="array<float>", batch_size=512)
    df.withColumn("probabilities", score("features"))

    predict(df, model, inputs="features", return_type="array<float>", batch_size=512)
"""

from horovodrunner.inference.frame import predict
from horovodrunner.inference.model import Model
from horovodrunner.inference.udf import PredictUdf, predict_batch_udf, predict_udf

__all__ = ["Model", "PredictUdf", "predict", "predict_batch_udf", "predict_udf"]
