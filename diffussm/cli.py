"""The command line: arguments, help, and exit codes. The verbs themselves are in `commands`.

A verb is imported only when it is called, so that `--help` answers at once.
"""

import argparse
import importlib
import os
import signal
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from diffussm.runtime.errors import OutOfMemoryError, UserError, exit_code_of

VERBS = {
    "train": "train a model; the same command continues an interrupted run",
    "status": "tell where runs are, from outside",
    "encode": "turn images into latents once, for many trainings",
    "sample": "draw images from a checkpoint",
    "evaluate": "measure a checkpoint or stored samples: FID, sFID, IS, precision, recall, bits per dimension",
    "stats": "take the statistics of a data set that samples are compared with",
    "inspect": "look at a data set: what is in it, what is wrong with it, how fast it is read",
    "import": "make a run directory from public DiT weights",
    "export": "write a checkpoint's weights for other programs",
    "compare": "set runs beside each other: a table, curves, samples from the same noise",
    "report": "write one HTML page about a run or a sweep",
    "complexity": "print parameters, multiply-accumulates, SSM work and activations of models",
    "plan": "foresee a training from raw archive to table row: disk, time, memory, price",
    "schedules": "plot noise schedules and print them as a table",
    "bench": "measure speed and memory against textbook S4D, attention, DiT, diffusers and torchvision",
}
SWEPT = ("train", "sample", "evaluate")  # verbs that take -m
MODULES = {"import": "import_weights", "inspect": "inspect_data"}  # where the verb is no name for a module
PATHS = {"import": "FILE ", "compare": "RUN_DIR ... ", "report": "RUN_DIR ... "}  # what goes without a key

DESCRIPTIONS = {
    "train": """\
        Train a model. Everything is set by key=value overrides of one configuration:

          experiment=NAME               a complete recipe; what follows changes it
          name=NAME                     the run; its directory is runs/NAME (run_dir=DIR for another)
          model= data= optimizer=       choose between the options listed below
          autoencoder=sd_vae_ft_ema     diffuse its latents; autoencoder.pretrained=DIR where it is not on the hub
          objective=flow sampler=flow_heun
                                        rectified flow instead of diffusion
          objective.prediction=v        eps, x_0 or v; diffusion.zero_terminal_snr=true needs one of the last two
          model.hidden_size=128         any parameter of what was chosen
          trainer.batch_size=256        images per step (global)
          trainer.total_images=2M       length of training; suffixes k, M, Ki, Mi
          trainer.save_every_images=    interval of checkpoints (also sample_, log_)
          trainer.precision=bf16        bf16, fp16 or fp32; trainer.tf32=false: no rounding of what is fp32
          trainer.compile=true          torch.compile of the model's blocks
          trainer.ema_decays=[0.9999]   averages of the weights; trainer.ema_power=[0.05,0.1]: also of these shares
                                        of the run, and trainer.ema_snapshot_every_images=1M: kept for later
          trainer.device_batch_size=    split a step into several passes, to fit the memory
          model.activation_checkpointing=true
                                        compute activations again instead of keeping them
          trainer.num_processes=8       one for each GPU, started here (torchrun and srun: leave it out);
                                        trainer.max_restarts=3 times in a row when one is lost
          trainer.parallel=fsdp         a part of the model in each of them, where it fits no device whole
          trainer.num_workers=2         processes that read images, for each one that trains
          evaluation=NAME               what `diffussm evaluate` will measure; none for nothing
          logger=tensorboard            or wandb, or [tensorboard,wandb]: where metrics.jsonl is shown too
          evaluation.every_images=1M    measure in training too, on all processes; the best checkpoint is kept in
                                        best/ (trainer.keep_best=false: it is not)
          trainer.profile=true          measure where the time of a step goes: profile/profile.md, trace.json
          init_from=PATH                fine-tune: begin with the weights (init_weights=ema) of a run, a checkpoint
                                        or a file as `import` takes; what depends on the classes is made anew
          trainer.dry_run=true          check all this, say what it costs and which files are missing, and stop

        With -m, train a run for every combination of choices, in runs/SWEEP/CHOICES. Run again, the same command
        skips what is finished, continues what was interrupted, retries what failed; Ctrl-C stops in good order:

          -m model=dit_tiny,diffussm_tiny seed=range(3)
                                        choices; name=SWEEP names their directory
          -m sweep=NAME                 the choices of configs/sweep/NAME.yaml
          hydra/launcher=joblib hydra.launcher.n_jobs=2
                                        two at a time, or submitit_slurm (pip install 'diffussm[sweep]')
          trainer.num_processes=2       processes of each run

        The run directory is a function of the configuration, so the same command again continues where the
        newest valid checkpoint left off, bit for bit. Exit codes: 0 done, 2 configuration, 65 data,
        70 diverged, 71 out of memory, 73 run directory, 74 I/O, 75 stopped by a signal (run it again).""",
    "status": """\
        Tell where runs are: progress, speed, losses, checkpoints, and what has happened to them. Only reads.

          RUN_DIR ...                   run directories, such as runs/digits or runs/*
          --json                        one line of JSON for each

        A run that says that it runs is called gone if its process on this machine is no more, and stalled if it
        has been silent for longer than it said it would be. Exit codes: 0 running or finished, 75 stopped by a
        signal (run it again), 73 no run there, 1 gone, stalled or unknown; of a failed run, its own. Of several
        runs, the first that is not 0.""",
    "encode": """\
        Encode a data set: the moments of the posterior of every image and its mirror image, which
        `diffussm train data=latents data.path=DIR` samples anew in every step. Run again, the same command
        continues where it was stopped or killed.

          data=image_folder data.path=DIR data.resolution=256
                                        the images; those that cannot be read are listed in bad_files.jsonl
          data.max_bad_fraction=0.01    how many of them may be unreadable
          autoencoder=NAME              what encodes them
          to=DIR                        where the latent set goes
          batch_size=32 num_workers=4   images in one pass; processes that read them
          dtype=fp16                    of what is stored, fp16 or fp32
          shard_size=4096               images in one file
          device=cuda                   auto, cpu, cuda, cuda:1

        Several GPUs, or the cores of a CPU, share the work under torchrun; the result is the same, byte for byte:

          torchrun --nproc_per_node=8 -m diffussm encode ...""",
    "sample": """\
        Draw images from a checkpoint and save them with a grid (rows = classes).

          checkpoint=PATH               a run directory (newest valid checkpoint) or one checkpoint
          num_images=100 classes=[3,7]  how many, of which classes
          labels=cyclic                 one class after the other; balanced: as often, in random order; drawn
          format=png                    or npz (samples.npz: arr_0 as ADM's evaluator reads it, labels) or tar
                                        (shard-000000.tar and so on, as WebDataset reads them)
          num_processes=8               share the work; or under torchrun or srun
          range_size=256                images that are finished at once, and in one tar file
          sampler=ddim                  default: the run's configuration, as for the lines below
          sampler.num_steps=50 sampling.seed=0 sampling.tf32=true
          sampling.weights=ema          ema, ema_<decay>, ema_power_<sigma_rel> or model; posthoc_<sigma_rel> is an
                                        average of another length, made of the run's ema_snapshots
          guidance.scale=1.5            classifier-free; guidance.channels=3
          guidance.interval=[100,800]   the timesteps at which it is guided
          guidance=classifier guidance.checkpoint=PATH guidance.scale=5
                                        by a classifier (experiment=digits_classifier trains one)
          guidance=autoguidance guidance.checkpoint=PATH
                                        by a weaker model of the same data
          autoencoder.pretrained=DIR    where the run's autoencoder is now
          out=DIR                       default: a directory under samples/ of the run
          trust_checkpoint=true         build what a checkpoint names from outside diffussm

        Image i is a function of (sampling.seed, i). Run again, the same command continues where it was stopped
        (exit code 75) or killed, on any number of processes; no image is drawn twice. With -m, draw for every
        combination of choices key=a,b.""",
    "evaluate": """\
        Generate images from a checkpoint and compare them with a reference, or measure the model on real images;
        prints a table, writes results.json. Run again, the same command continues where it was stopped (exit
        code 75) or killed; the result does not depend on the number of processes.

          checkpoint=PATH               a run directory (newest valid checkpoint) or one checkpoint
          checkpoints='RUN/checkpoints/*'
                                        several, each by itself; draws the first metric against images seen
          samples=PATH evaluation=NAME  stored images instead: a folder, an npz in ADM's layout, a tar file, or
                                        what `sample` has written
          evaluation.reference=PATH     an npz, or images to compare with, as for samples=
          num_processes=8               share the work; or under torchrun or srun
          labels=balanced               of generated images, as for `sample`
          range_size=256 keep_features=true
                                        images whose features are finished at once; leave them on the disk
          evaluation.num_samples=1000   default: the evaluation of the run's configuration
          sampler= sampler.num_steps= guidance.scale= sampling.weights=
                                        as for `sample`
          metrics=[fid,is]              of fid, sfid, is, precision, recall, kid, density, coverage,
                                        class_agreement (default: those that the reference allows)
          evaluation.intervals=true evaluation.extrapolate=true
                                        also 95% confidence intervals; FID at infinitely many samples
          evaluation.extractor.weights=FILE
                                        of DINOv2, or of Inception (default: those in torch's cache)
          metrics=[vlb]                 the exact variational bound on real images, in bits per dimension, the
                                        predicted x_0 clipped to the range of pixels
          metrics=[loss]                the training objective on real images, at evenly spaced timesteps
          metrics=[inversion]           how far DDIM, run backwards and forwards without clipping, ends from
                                        images (rms of x_0)
          data.split=held_out likelihood_images=100
                                        on which images, and how many (drawn by sampling.seed); default: all
                                        of the run's data
          autoencoder.pretrained=DIR    where the run's autoencoder is now
          out=FILE                      default: results.json of the run
          trust_checkpoint=true         build what a checkpoint names from outside diffussm

        As a gate, with exit code 1 if a limit is broken and 0 if none is:

          gate.fid_max=6 gate.recall_min=0.7
                                        limits: _max of fid, fid_inf, sfid, kid, vlb, inversion, loss, _min of the
                                        others
          gate.relative_to=FILE.json    no metric may be worse than the mean of this baseline ...
          gate.deviations=6             ... by more than so many standard deviations of its results
          gate.fid_tolerance=0.5        ... and (for any metric) by more than this
          gate.add_to=FILE.json         add this result to a baseline, which begins with the first; about five runs
                                        that differ in seed, or one run's samples at five sampling.seed
          gate.junit=FILE gate.summary=FILE
                                        the verdicts as JUnit's XML; in Markdown, at the end of a file

        With -m, measure every combination of choices, each in evaluate/CHOICES/ of the run; of several checkpoints
        and nothing else, each in its own results.json:

          -m guidance.scale=1,1.25 sampler.num_steps=10,25
          -m sweep=NAME                 the choices of configs/sweep/NAME.yaml
          -m checkpoint=RUN,RUN hydra/launcher=joblib hydra.launcher.n_jobs=2""",
    "stats": """\
        Take the reference statistics and images of a data set, as evaluations compare samples with, and write them
        in the npz layout of ADM: mu, sigma, mu_s, sigma_s of all images, arr_0 of some.

          data=NAME data.path=DIR data.resolution=256
                                        the images; those that cannot be read are left out and listed
          to=FILE.npz                   where they go; the unreadable ones beside it in FILE.bad_files.jsonl
          evaluation=NAME               whose network measures the images: digits, fid50k (Inception), dinov2_50k
          num_images=10000 seed=0       how many images go along, a random choice of this seed
          batch_size=64 num_workers=4   images in one pass; processes that read them
          device=cuda                   auto, cpu, cuda, cuda:1

        `diffussm evaluate ... evaluation.reference=FILE.npz` compares samples with them.""",
    "inspect": """\
        Look at a data set and say what is in it, what is wrong with that and what to do: classes, sizes, files
        that are no images, copies, grey among colour. And how fast the loader reads it.

          data=NAME data.path=DIR data.resolution=256
                                        the images, or data=latents
          examined=1000                 images that are looked at, a random choice of this seed=0; null for all
          autoencoder=NAME              also what it loses: PSNR, and a grid of originals and reconstructions
          num_images=64                 pictures in the grids
          seconds=3 batch_size=32 num_workers=4
                                        how long and with what the loader is timed
          device=cuda                   of the autoencoder: auto, cpu, cuda, cuda:1
          out=DIR                       of inspect.json, bad_files.jsonl, samples.png, reconstructions.png;
                                        default: a directory below inspect/""",
    "import": """\
        Make a run directory from the weights of a DiT, such as the public DiT-XL-2-256x256.pt; `sample`,
        `evaluate`, `export` and `train` take it as one of their own. The autoencoder is named, not needed yet.

          FILE                          .pt, .pth or .safetensors with the official names or those of diffusers,
                                        or a directory that diffusers wrote; nothing in it is executed
          name=NAME run_dir=DIR         default: runs/<name of the file>
          model.num_heads=16            where the size is not a published one
          model.input_size=32           where the file does not tell the size of the latents
          autoencoder=sd_vae_ft_ema     what turns latents into images (this one for 4 channels, unless told)
          autoencoder.pretrained=DIR    where it is; can be said later, to `sample` and the others
          image_shape=[3,256,256]       default: what the autoencoder decodes to

        Everything else is a key of `diffussm train`, recorded for what comes next.""",
    "export": """\
        Write the weights of a checkpoint as safetensors for other programs.

          checkpoint=PATH               a run directory (newest valid checkpoint) or one checkpoint
          layout=pipeline               the default: a directory with a model card that
                                        diffussm.pipeline.DiffuSSMPipeline.from_pretrained loads, for diffusers;
                                        an autoencoder goes with it (autoencoder.pretrained=DIR: where it is now)
          layout=official               one file with the names of DiT's authors (of DiffuSSM: its own)
          layout=diffusers              a directory for DiTTransformer2DModel.from_pretrained; its outputs differ
                                        slightly, for its timestep sinusoid has other frequencies
          weights=ema                   as sampling.weights of `sample`
          to=PATH                       default: under export/ of the run""",
    "compare": """\
        Set runs beside each other: a table of what they cost and how good they are, the settings that differ,
        curves of loss and FID against images, compute and time, and samples drawn from the same noise and labels.
        Prints the tables; writes them as Markdown, CSV and LaTeX, the curves as PNG, and all as one HTML page.

          RUN_DIR ...                   run directories, or directories that hold some, such as a sweep's
          match=compute                 at equal terms: read each run where it had had as much compute (also: time,
                                        images) as the one that had least; match=parameters: in pairs
          tolerance=0.05                by what share the parameters of a pair may differ
          drawn_images=20               of each run; 0: none
          sampler.num_steps= guidance.scale= sampling.seed= classes=
                                        how they are drawn, as for `sample`; default: as each run is configured
          autoencoder.pretrained=DIR    where the runs' autoencoder is now
          device=cuda                   auto, cpu, cuda, cuda:1
          out=DIR                       default: compare/ in the directory that holds the runs

        Of runs that differ in their seed alone there are means and standard deviations too, and one mean curve.
        Runs on ImageNet stand beside the figures that the paper has published.""",
    "report": """\
        Write one HTML page about a run, or about a sweep: the comparison first, then each run. It needs no network
        and no server; beside it are its tables as Markdown, CSV and LaTeX and its curves as PNG.

          RUN_DIR ...                   run directories, or directories that hold some, such as a sweep's; running
                                        or finished, with checkpoints or without
          drawn_images=80               samples by class, of each run; 0: none
          denoising_images=4            how many of them are shown step by step
          match= tolerance=             of the comparison, as for `compare`
          sampler.num_steps= guidance.scale= sampling.seed= classes=
                                        how they are drawn, as for `sample`; default: as each run is configured
          autoencoder.pretrained=DIR    where the runs' autoencoder is now
          device=cuda                   auto, cpu, cuda, cuda:1
          out=DIR                       default: report/ in the run, or in the directory that holds the runs""",
    "complexity": """\
        Print what models cost on paper, per image of one forward pass. Nothing is computed.

          model=NAME                    one model; default: every preset
          model.hidden_size=512         any parameter of it
          resolutions=[256,512,1024]    of images, in pixels; their latents are an eighth of that

        GMAC: multiply-accumulates of dense layers and attention, which papers call Gflops. SSM GFLOP: FFTs,
        spectral products and kernels of the state-space layers. Activations: kept for backward, in fp32.""",
    "plan": """\
        Print what a whole job will take: raw data, encoding, training, memory, checkpoints, evaluation. Nothing is
        started and nothing is needed; `train` has the keys of the run itself.

          experiment=NAME               the run, and any key of `diffussm train`
          gpus=8 gpu=a100               a100, a100_40, h100, h100_pcie, h200, l40s, a40, a10, l4, v100, v100_16,
                                        rtx4090, rtx3090; or cpu, as this machine's
          mfu=0.4                       the share of their peak that they reach; 0.35 is assumed
          price_per_hour=2              of one GPU; none by default
          archive=imagenet num_images=N the raw data: imagenet, lsun_bedroom, lsun_church (default: the one that
                                        data.path is called after); or so many images
          dtype=fp16 num_samples=50000  of the latent set; of the evaluation
          evaluation=fid50k sampling.precision=bf16 sampler= guidance.scale=
                                        as for `evaluate`
          json=true                     print JSON

        Every number is computed, published, given, measured or assumed; what follows from several is as uncertain
        as the most uncertain.""",
    "schedules": """\
        Plot noise schedules, alphabar and SNR against t/T, and print where they pass as a table.

          diffusion=NAME                one schedule; default: every preset
          diffusion.num_timesteps=4000  any parameter of the one that is chosen
          diffusion.zero_terminal_snr=true
                                        end in pure noise
          out=FILE                      .png, .svg or .pdf; default: schedules.png, replaced if it is there""",
    "bench": """\
        Measure time and memory, forward and training step, in one process with alternating repetitions. Prints
        a Markdown table with goals; writes bench.json and bench.md, after every result.

          suites=[layer,block]          of layer, convolution, block, model, dit, sampling, gemm, xl,
                                        data, trainer, evaluation; and scaling, of the models as images grow:
          resolutions=[256,512,1024,2048]
                                        of the images, in pixels
          lengths=[256,1024,4096,16384] tokens
          batch_size=4 hidden_size=384 d_state=64 depth=13
          repetitions=9 seconds=10      at most, for every call
          call_limit_seconds=120 memory_limit_gib=12
                                        skip what is expected to need more
          keep_freed_memory=true        with the C library's allocator as `train` sets it
          device=cuda                   adds bf16 (precision=), torch.compile (compile=) and the suite xl
          out=DIR                       default: bench

        Leave the machine alone while it runs. Goals are stated for the default sizes on a CPU.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        module = "sweep" if getattr(options, "multirun", False) else MODULES.get(options.verb, options.verb)
        return importlib.import_module(f"diffussm.commands.{module}").run(options)
    except UserError as error:
        if not error.is_reported:
            print("diffussm:", *str(error).split(), file=sys.stderr)  # one line, whatever it quotes
        return error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit does not flush into it
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(
            f"diffussm: {error.filename or 'I/O'}: {error.strerror or error}: free space, or write elsewhere",
            file=sys.stderr,
        )
        return exit_code_of(error)
    except KeyboardInterrupt as error:
        print("diffussm: interrupted", file=sys.stderr)
        return exit_code_of(error)
    except Exception as error:
        if exit_code_of(error) != OutOfMemoryError.exit_code:
            raise
        print("diffussm: out of memory: lower sampling.batch_size or trainer.device_batch_size", file=sys.stderr)
        return exit_code_of(error)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diffussm", description="Attention-free diffusion: train, sample, evaluate.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        many = "[-m] " if verb in SWEPT else ""
        usage = f"diffussm {verb} {PATHS.get(verb, '')}{many}[--config-dir DIR] [--print-config] [key=value ...]"
        command = verbs.add_parser(
            verb,
            help=summary,
            description=textwrap.dedent(DESCRIPTIONS[verb]),
            epilog=_describe_groups(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage="diffussm status [--json] RUN_DIR ..." if verb == "status" else usage,
            allow_abbrev=False,
        )
        if verb == "status":  # which has no configuration
            command.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR")
            command.add_argument("--json", action="store_true", help="print JSON lines")
            continue
        command.add_argument("overrides", nargs="*", metavar="key=value", help="configuration overrides")
        if verb in SWEPT:
            command.add_argument(
                "-m", "--multirun", action="store_true", help="a job for every combination of choices key=a,b"
            )
        command.add_argument("--config-dir", type=Path, help="a directory of your own configs/, searched too")
        command.add_argument(
            "--print-config", action="store_true", help="print the resolved configuration and do nothing"
        )
    options, rest = parser.parse_known_args(arguments)
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        parser.error(f"unknown option {unknown[0]}")
    if options.verb == "status":
        options.paths += map(Path, rest)
    else:
        options.overrides += rest  # what argparse could not place: overrides after an option
    return options


def _describe_groups(verb: str) -> str:
    """The options of every group that the verb's root names, read from the files alone."""
    package = Path(__file__).resolve().parent
    configs = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    file = configs / f"{verb}.yaml"
    root = file.read_text() if file.exists() else ""
    lines = []
    for group in sorted(path for path in configs.iterdir() if path.is_dir()):
        if f"- {group.name}:" in root:
            options = sorted(path.stem for path in group.glob("*.yaml"))
            lines.append(f"  {group.name + '=':<15}{' '.join(options)}")
    return "\n".join(["options of the groups:", *lines]) if lines else ""


if __name__ == "__main__":
    sys.exit(main())
