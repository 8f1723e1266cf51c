"""Sample images with Stable Diffusion 3: python sample_sd3.py --help."""

from common.errors import run_command
from generation.commands import FamilyDefaults, family_command

main = family_command(
    FamilyDefaults(
        "sd3",
        "Sample images with Stable Diffusion 3 from text prompts. Run again, it goes on where it stopped.",
        seeds="0-3",
        batch=4,
        outdir="samples/sd3_epd",
        exps={1024: "exps/sd3-1024", 512: "exps/sd3-512"},
    )
)

if __name__ == "__main__":
    run_command(main)
