"""Distribution `egmf-trainer`: packages `trainer` and `launch`, command `egmf`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "trainer" / "__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="egmf-trainer",
    version=VERSION,
    description="Distributed training of Expert-Guided Multimodal Fusion (EGMF) with large language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["trainer", "trainer.*", "launch", "launch.*"]),
    package_data={"launch": ["templates/*"], "trainer": ["py.typed", "results/report/templates/*"]},
    entry_points={"console_scripts": ["egmf = trainer.cli:main"]},
    install_requires=[
        "accelerate>=1.2",
        "bitsandbytes>=0.49",
        "datasets>=3.0",
        "deepspeed>=0.18",
        "Jinja2>=3.1",
        "MarkupSafe>=2.1",
        "matplotlib>=3.8",
        "mlflow>=3.0",
        "ninja>=1.11",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pandas>=2.2",
        "peft>=0.18",
        "psutil>=5.9",
        "pyarrow>=15",
        "pydantic>=2.7",
        "PyYAML>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.5",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "tokenizers>=0.21",
        "torch>=2.6",
        "transformers>=5.0,<6",
        "typer>=0.12",
    ],
    extras_require={
        "cuda": ["nvidia-ml-py>=12", "triton>=3.3,<3.10"],
        "flash": ["flash-attn>=2.7"],
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "triton>=3.3,<3.10; platform_system == 'Linux'",
            "types-PyYAML>=6.0",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Operating System :: POSIX :: Linux",
    ],
)
