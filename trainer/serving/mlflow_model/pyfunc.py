"""The code from which MLflow makes the model when it is loaded; MLflow copies this file beside the artefact and runs it there."""

from mlflow.models import set_model

from trainer.serving.mlflow_model.model import EmotionModel

set_model(EmotionModel())
