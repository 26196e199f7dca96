"""The HTTP server of `egmf serve`: requests are read within limits, their samples batched for the model, and answered as JSON.

A :class:`trainer.serving.predictor.Predictor` enters; a process that answers until it is told to stop leaves. FastAPI and uvicorn come with
``pip install 'egmf-trainer[serve]'``.
"""
