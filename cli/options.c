/* The table of commands and options (see options.h), look-up in it, and the nearest known word for a misspelt one. */
#include "options.h"

#include <stdlib.h>
#include <string.h>

#include "args.h"
#include "fields.h"

#define MODELS "A path is a .safetensors or .gguf file, an *.index.json, a folder (diffusers, transformers, or plain), or a written container."

static const cli_command commands[] = {
    {"inspect", "PATH", 1, 1, NULL, "show what a model or container holds",
     "Format, modality, element types, every tensor with its shape, and whether it would be quantized.\n" MODELS
     "\nReads headers only. With the options of quantize it shows what they would do.",
     "arrowquant inspect model.safetensors\narrowquant inspect pipeline-folder --component unet -v\narrowquant inspect model-int4 --json", cli_run_inspect},
    {"quantize", "PATH", 1, 1, NULL, "make a smaller model and verify it",
     "Writes a folder of Parquet files with the copied configs; without -o it is NAME-int4 (by the bits) beside the source.\n"
     "The result is read back and compared before it gets its name. The source is never changed.\n"
     "An interrupted run goes on when the same command is given again, and ends with the same bytes.\n"
     "Settings: default < profile < --config file < ARROW_QUANT_* environment < options.",
     "arrowquant quantize model.safetensors\narrowquant quantize pipeline-folder -o small --bits 4 --group 64 --method search\n"
     "arrowquant quantize model.safetensors --bits 2 --layer '*attn*=bits:8' --exclude 'head.*'\n"
     "arrowquant quantize model.safetensors --profile edge --print-config > run.yaml",
     cli_run_quantize},
    {"plan", "PATH", 1, 1, NULL, "bits and groups of each layer for a size, without writing a model",
     "Tries every allowed width, group size and parameter form on rows of each layer and picks those with the least error within the budget.\n"
     "With --calib errors are those of the layers' outputs, with gradients in it they are weighted by what they cost the model.\n"
     "Exit code 5 and the smallest reachable size when nothing fits.\n"
     "With --target-compression or --accuracy-weight: a group size for each layer at one width (--bits), by its sensitivity.",
     "arrowquant plan model.safetensors --target-size 6.5GB -o plan.json\narrowquant plan pipeline-folder --target-size 200MB --calib model.aqcal\n"
     "arrowquant plan model.safetensors --bits 2 --sensitivity variance --target-compression 10 -o allocation.json",
     cli_run_plan},
    {"verify", "PATH", 1, 1, NULL, "check a container, and measure its error against the source",
     "Structure, SHA-256 of each file, a hash per tensor, non-finite values and bounds of the parameters.\n"
     "With --against the error of each tensor is measured. Exit code 4 when something is wrong or below the floor.",
     "arrowquant verify model-int4\narrowquant verify model-int4 --against model.safetensors --min-accuracy 0.99", cli_run_verify},
    {"diff", "A B", 2, 2, NULL, "error between two models, tensor by tensor", "Each of A and B is a model or a container; B is measured against A.",
     "arrowquant diff model.safetensors model-int4\narrowquant diff model-int4 model-int8 -v", cli_run_diff},
    {"export", "PATH", 1, 1, NULL, "write a container as a model that other programs load",
     "safetensors: the folder layout of the source comes back, same names, shapes and side files; OUT may be a single .safetensors file.\n"
     "gguf: one file for stable-diffusion.cpp, ComfyUI-GGUF and diffusers. comfy-int8: one file for ComfyUI and stable-diffusion.cpp.\n"
     "gptq: a folder with quantization_config for transformers, vLLM and diffusers.\n"
     "Codes are taken over where the format's grid agrees with theirs; the error that coding anew adds is printed. Which program loads what: docs/exports.md.",
     "arrowquant export model-int4 --to safetensors\narrowquant export model-int4 --to safetensors --dtype f16 -o model-f16.safetensors\n"
     "arrowquant export model-int4 --to gguf -o model.gguf\narrowquant export model-int8 --to comfy-int8 --rotate hadamard --source model.safetensors\n"
     "arrowquant export model-int4 --to gptq -o model-gptq",
     cli_run_export},
    {"report", "PATH", 1, 1, NULL, "write an HTML page about a container",
     "Sizes, errors, bits, fallbacks with their reasons and the command that makes it again, in one file without scripts or anything from elsewhere.\n"
     "With --against errors and sensitivities are measured, with --calib those of the outputs over the schedule as well.",
     "arrowquant report model-int4 -o report.html\narrowquant report model-int4 --against model.safetensors --calib model.aqcal -o report.html",
     cli_run_report},
    {"bench", "", 0, 0, NULL, "speed of the kernels on this machine",
     "Codes to F32 against copying memory, and products on codes against those with F32 weights, with the kernels of each instruction set of this CPU.\n"
     "A few seconds; a first look, when nothing else runs. The first figures hold for one thread, products for --threads.",
     "arrowquant bench\narrowquant bench --threads 1 --json", cli_run_bench},
    {"calib", "ACTION FILE...", 2, 1000, "show|merge|check|import|synth", "look at calibration statistics, merge them, check them against a model",
     "show FILE...: what was recorded of each layer; -v: per time group.\n"
     "merge A B... -o OUT: the sum of several recordings. --max-memory bounds what is held; the rest goes to a temporary file.\n"
     "check FILE MODEL: every layer must be a tensor of the model with that many inputs (exit code 3), and layers without statistics are listed.\n"
     "import IMATRIX [MODEL] -o OUT: an importance matrix of llama.cpp (.dat or .gguf), the layers whose names and inputs fit the model. Mean squares alone.\n"
     "synth MODEL -o OUT.jsonl: a data set of random inputs, marked as synthetic, for when there are no data. It is not yet statistics: this program does not\n"
     "run models; the recorder (arrow_quant_v2.torch) runs the model on it. Image and audio: standard normal values, text: even tokens and rising mask "
     "ratios.\n"
     "Statistics are recorded from Python; docs/calibration.md.",
     "arrowquant calib show model.aqcal\narrowquant calib merge a.aqcal b.aqcal -o both.aqcal\narrowquant calib check model.aqcal model.safetensors\n"
     "arrowquant calib synth pipeline-folder --samples 64 -o synthetic.jsonl",
     cli_run_calib},
    {"version", "", 0, 0, NULL, "version of the program and its kernels", "With --json for programs.", "arrowquant version\narrowquant version --json",
     cli_run_version},
    {"help", "[COMMAND]", 0, 1, "*", "this help, or that of a command", "With --markdown the whole manual, which is docs/cli.md.",
     "arrowquant help quantize\narrowquant help --markdown > cli.md", cli_run_help},
    {"completion", "SHELL", 1, 1, "bash|zsh|fish|powershell", "print a script that completes commands and options", "SHELL is bash, zsh, fish or powershell.",
     "source <(arrowquant completion bash)\narrowquant completion zsh > ~/.zfunc/_arrowquant\narrowquant completion fish > "
     "~/.config/fish/completions/arrowquant.fish",
     cli_run_completion},
};

static const char *const group_titles[GROUP_COUNT] = {
    [GROUP_SCHEME] = "Scheme", [GROUP_METHOD] = "Method", [GROUP_LAYERS] = "Layers",        [GROUP_INPUT] = "Input",   [GROUP_QUALITY] = "Quality",
    [GROUP_OUTPUT] = "Output", [GROUP_RUN] = "Run",       [GROUP_CONFIG] = "Configuration", [GROUP_FIELDS] = "Fields", [GROUP_EVERYWHERE] = "Everywhere",
};

/* name, letter, value, words, field, set, repeat, optional value, group, commands, help */
static const cli_option table[] = {
    {"profile", 0, "NAME", "edge|local|cloud", "deployment_profile", NULL, false, false, GROUP_SCHEME, "inspect quantize plan",
     "a set of values: edge = 2 bits, group 256, floor 0.65; local = 4, 128, 0.85; cloud = 8, 64, 0.95"},
    {"bits", 0, "N", "2|4|8", "bit_width", NULL, false, false, GROUP_SCHEME, "inspect quantize plan", "bits of a code (4)"},
    {"group", 0, "N", "32|64|128|256|row", "group_size", NULL, false, false, GROUP_SCHEME, "inspect quantize plan",
     "weights that share a scale, along the inputs; row: a whole row (128)"},
    {"sym", 0, NULL, NULL, "symmetric", "true", false, false, GROUP_SCHEME, "inspect quantize plan", "zero point fixed in the middle"},
    {"asym", 0, NULL, NULL, "symmetric", "false", false, false, GROUP_SCHEME, "inspect quantize plan", "a zero point per group (default)"},
    {"params", 0, "FORM", "auto|f16|two-level|f32", "params", NULL, false, false, GROUP_SCHEME, "inspect quantize",
     "how scales and offsets are stored (auto: two-level at 2 bits, else f16)"},

    {"method", 0, "NAME", "auto|rtn|search|gptq|r2q", "method", NULL, false, false, GROUP_METHOD, "inspect quantize plan",
     "rtn: min and max of each group; search: least squared error; with --calib gptq: least error of the layer's output, r2q: the same on two signs at 2 bits "
     "(auto: by modality and calibration)"},
    {"rotate", 0, "WHAT", "none|hadamard", "rotate", NULL, false, false, GROUP_METHOD, "quantize",
     "hadamard: rotate the inputs of a layer where that lowers the error of its output (none)"},
    {"smooth", 0, "WHAT", "auto|none|ditas", "smooth", NULL, false, false, GROUP_METHOD, "quantize",
     "equalize input channels; auto: for image and audio, where that lowers the error of the output; ditas: every layer (auto)"},
    {"act-bits", 0, "N", "8|16", "act_bits", NULL, false, false, GROUP_METHOD, "quantize",
     "bits of the layers' inputs at run time; 8: scales per group of timesteps are stored (16)"},
    {"time-groups", 0, "N", NULL, "num_time_groups", NULL, false, false, GROUP_METHOD, "quantize", "groups of timesteps that share activation parameters (10)"},

    {"exclude", 0, "GLOB", NULL, "exclude", NULL, true, false, GROUP_LAYERS, "inspect quantize plan", "keep the tensors whose name matches; may be repeated"},
    {"include", 0, "GLOB", NULL, "include", NULL, true, false, GROUP_LAYERS, "inspect quantize plan",
     "quantize matching tensors that would be kept otherwise; may be repeated"},
    {"layer", 0, "GLOB=KEY:VALUE,...", NULL, "layer_overrides", NULL, true, false, GROUP_LAYERS, "inspect quantize plan",
     "settings of matching tensors, as in '*attn*=bits:8,group:64'; may be repeated, the last match wins"},
    {"allow-unmatched", 0, NULL, NULL, NULL, NULL, false, false, GROUP_LAYERS, "quantize plan", "a pattern that matches nothing is no error"},

    {"shape", 0, "N,N,...", NULL, NULL, NULL, false, false, GROUP_INPUT, "calib", "synth: shape of one input, as in 4,64,64 (from the model's config.json)"},
    {"component", 0, "NAME", NULL, NULL, NULL, false, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "folder of a diffusers pipeline to read (transformer, else unet)"},
    {"variant", 0, "NAME", NULL, NULL, NULL, false, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "which weights when a folder has several, as in fp16"},
    {"lora", 0, "FILE[:STRENGTH]", NULL, NULL, NULL, true, false, GROUP_INPUT, "inspect quantize plan verify export report",
     "merge an adapter into the weights before anything else (kohya and PEFT names, strength 1); may be repeated"},
    {"modality", 0, "NAME", "text|code|image|audio", "modality", NULL, false, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "what the model makes (detected)"},
    {"calib", 0, "FILE", NULL, "calibration_path", NULL, false, false, GROUP_INPUT, "quantize plan report",
     "statistics of the layers' inputs (.aqcal): errors are measured and lowered in the layers' outputs"},
    {"nonfinite", 0, "WHAT", "error|keep|zero", "nonfinite", NULL, false, false, GROUP_INPUT, "quantize plan",
     "NaN and infinity: refuse, keep that tensor as it is, or replace by zero and count (error)"},
    {"skip-unknown-dtype", 0, NULL, NULL, NULL, NULL, false, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "carry tensors of unknown element type over as bytes instead of refusing the file"},
    {"no-follow-symlinks", 0, NULL, NULL, NULL, NULL, false, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "refuse weights files that are symbolic links"},
    {"limit", 0, "NAME=VALUE", NULL, NULL, NULL, true, false, GROUP_INPUT, "inspect quantize plan verify diff report calib",
     "raise a limit on untrusted input: header_bytes, n_tensors, name_bytes, index_bytes, config_bytes, n_shards, json_depth"},

    {"min-accuracy", 0, "X", NULL, "min_accuracy", NULL, false, false, GROUP_QUALITY, "quantize plan verify",
     "least cosine similarity of a layer, 0 to 1 (the profile's)"},
    {"target-size", 0, "SIZE", NULL, "target_model_size_mb", NULL, false, false, GROUP_QUALITY, "quantize plan",
     "largest size of the result, as in 6.5GB: exit code 5 when the settings give more"},
    {"sensitivity", 0, "NAME", "gradient|hessian|variance", NULL, NULL, false, false, GROUP_QUALITY, "plan",
     "score each layer: gradient and hessian need --calib"},
    {"target-compression", 0, "X", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan", "compression that counts 1 in the choice of group sizes (10)"},
    {"accuracy-weight", 0, "X", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan", "weight of accuracy against compression in it, 0 to 1 (0.7)"},
    {"layer-weights", 0, "FILE", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan",
     "what an error in each layer costs the model, as JSON by layer name (computed: by gradients in --calib, else by size)"},
    {"sample", 0, "N", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan", "weights of a layer that are measured; 0: all (65536)"},
    {"generations", 0, "N", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan", "go on by evolutionary search for so many generations (0)"},
    {"population", 0, "N", NULL, NULL, NULL, false, false, GROUP_QUALITY, "plan", "plans in a generation (20)"},
    {"cache", 0, "FOLDER", NULL, NULL, NULL, false, false, GROUP_RUN, "plan", "keep what was measured, for the next plan of the same layers"},
    {"target-bpw", 0, "X", NULL, "target_bpw", NULL, false, false, GROUP_QUALITY, "quantize plan", "the same in bits per weight of the quantized layers"},
    {"allow-bits", 0, "BITS,...", NULL, "allow_bits", NULL, false, false, GROUP_QUALITY, "quantize plan", "widths that a plan may use, as in 2,4 (2,4,8,16)"},
    {"plan", 0, "FILE", NULL, "plan_path", NULL, false, false, GROUP_QUALITY, "quantize", "carry out this plan of bits and groups per layer"},
    {"fallback", 0, "BITS,...", NULL, "fallback", NULL, false, false, GROUP_QUALITY, "quantize", "widths that a layer under its floor goes up, as in 2,4,8"},
    {"fail-fast", 0, NULL, NULL, "fail_fast", "true", false, false, GROUP_QUALITY, "quantize", "stop at the first layer under its floor"},
    {"strict", 0, NULL, NULL, NULL, NULL, false, false, GROUP_QUALITY, "quantize", "any warning makes the run fail (exit code 4)"},
    {"against", 0, "SOURCE", NULL, NULL, NULL, false, false, GROUP_QUALITY, "verify report", "the source model: measure the error of each tensor"},

    {"to", 0, "FORMAT", "safetensors|gguf|comfy-int8|gptq", NULL, NULL, false, false, GROUP_OUTPUT, "quantize export",
     "format to write; quantize: beside the container, as NAME.gguf, NAME-comfy-int8.safetensors, NAME-gptq"},
    {"type", 0, "TYPE", "auto|q8_0|q4_0|q4_1|q4_k|q2_k|f16", NULL, NULL, false, false, GROUP_OUTPUT, "quantize export",
     "gguf: blocks of the layers (auto: those that the codes fit)"},
    {"rotate", 0, "WHAT", "none|hadamard", NULL, NULL, false, false, GROUP_OUTPUT, "export",
     "comfy-int8: multiply each 256 inputs by a Hadamard matrix, which spreads outliers; the loader undoes it (none)"},
    {"source", 0, "MODEL", NULL, NULL, NULL, false, false, GROUP_OUTPUT, "export",
     "the original model: layers whose codes do not fit the format are coded from it, not from the dequantized weights"},
    {"dtype", 0, "TYPE", "f32|f16|bf16", NULL, NULL, false, false, GROUP_OUTPUT, "export",
     "element type of the weights, or of what has no codes (that of the source; gguf: f16)"},
    {"output", 'o', "OUT", NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize plan export report calib",
     "where to write (beside the input: NAME-int4 by the bits, NAME-safetensors, NAME.gguf)"},
    {"overwrite", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize plan export report calib",
     "replace an existing output, once the new one is complete"},
    {"mkdir", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize export", "create missing parent folders"},
    {"shard-size", 0, "SIZE", NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize export", "begin a new file beyond this size (5GB)"},
    {"no-side-files", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize", "do not copy configs, tokenizer and other components"},
    {"no-verify", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize", "do not read the result back"},
    {"restart", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize", "discard the state of an interrupted run"},

    {"threads", 0, "N", NULL, "num_threads", NULL, false, false, GROUP_RUN, "quantize plan verify diff export report bench", "threads to use; 0: all (0)"},
    {"max-memory", 0, "SIZE", NULL, "max_memory_limit_mb", NULL, false, false, GROUP_RUN, "quantize plan calib", "most memory to use, as in 4GB"},

    {"config", 0, "FILE", NULL, NULL, NULL, false, false, GROUP_CONFIG, "inspect quantize plan", "read settings from a .yaml or .json file"},
    {"print-config", 0, NULL, NULL, NULL, NULL, false, false, GROUP_CONFIG, "quantize", "print the merged settings, which reproduce the run, and stop"},

    {"seed", 0, "N", NULL, "seed", NULL, false, false, GROUP_FIELDS, "quantize calib", "seed of what is drawn at random (0)"},
    {"samples", 0, "N", NULL, "calibration_samples", NULL, false, false, GROUP_FIELDS, "quantize calib",
     "short name of --calibration-samples; calib synth: samples to make (128)"},

    {"report", 0, "FILE", NULL, NULL, NULL, false, false, GROUP_OUTPUT, "quantize", "write an HTML page about the result as well"},
    {"show", 0, "LAYER", NULL, NULL, NULL, false, false, GROUP_OUTPUT, "report", "layer whose histograms are drawn (the one with the largest error)"},

    {"markdown", 0, NULL, NULL, NULL, NULL, false, false, GROUP_OUTPUT, "help", "print the whole manual as Markdown"},

    {"help", 'h', NULL, NULL, NULL, NULL, false, false, GROUP_EVERYWHERE, "*", "help of the command"},
    {"quiet", 'q', NULL, NULL, NULL, NULL, false, false, GROUP_EVERYWHERE, "*", "warnings and errors only"},
    {"verbose", 'v', NULL, NULL, NULL, NULL, true, false, GROUP_EVERYWHERE, "*", "say more: a line per tensor, whole lists; -vv: details of the run"},
    {"json", 0, NULL, NULL, NULL, NULL, false, false, GROUP_EVERYWHERE, "*", "one JSON object on stdout, for errors too"},
    {"progress", 0, "WHEN", "auto|always|never|json", NULL, NULL, false, false, GROUP_EVERYWHERE, "*",
     "progress on stderr: a bar on a terminal, else a line per 10 % or 30 s; json: one event per line (auto)"},
    {"color", 0, "WHEN", "auto|always|never", NULL, NULL, false, false, GROUP_EVERYWHERE, "*",
     "colors; auto heeds NO_COLOR, CLICOLOR_FORCE and TERM=dumb (auto)"},
    {"log", 0, "FILE", NULL, NULL, NULL, false, false, GROUP_EVERYWHERE, "*", "append everything that is logged to a file"},
};

size_t cli_n_commands(void) { return sizeof commands / sizeof commands[0]; }

const cli_command *cli_command_at(size_t index) { return &commands[index]; }

const cli_command *cli_command_find(const char *name) {
    for (size_t i = 0; i < cli_n_commands(); i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

const char *cli_group_title(cli_group group) { return group_titles[group]; }

static const size_t n_table = sizeof table / sizeof table[0];

size_t cli_n_table_options(void) { return n_table; }

size_t cli_n_options(void) { return n_table + cli_n_field_options(); }

const cli_option *cli_option_at(size_t index) { return index < n_table ? &table[index] : cli_field_option_at(index - n_table); }

bool cli_option_applies(const cli_option *option, const cli_command *command) {
    if (strcmp(option->commands, "*") == 0) return true;
    if (!command) return false;
    size_t n = strlen(command->name);
    for (const char *at = strstr(option->commands, command->name); at; at = strstr(at + 1, command->name))
        if ((at == option->commands || at[-1] == ' ') && (at[n] == 0 || at[n] == ' ')) return true;
    return false;
}

const cli_option *cli_option_find(const char *name, size_t n, const cli_command *command) {
    const cli_option *other = NULL;
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (strlen(option->name) != n || memcmp(option->name, name, n) != 0) continue;
        if (cli_option_applies(option, command)) return option;
        other = option;
    }
    return other;
}

const cli_option *cli_option_find_letter(char letter, const cli_command *command) {
    for (size_t i = 0; i < n_table; i++)
        if (table[i].letter == letter && cli_option_applies(&table[i], command)) return &table[i];
    return NULL;
}

bool cli_word_at(const char *words, size_t index, const char **word, size_t *n) {
    for (const char *at = words;; at++) {
        size_t len = strcspn(at, "|");
        if (index-- == 0) {
            *word = at;
            *n = len;
            return true;
        }
        at += len;
        if (!*at) return false;
    }
}

unsigned cli_edit_distance(const char *a, size_t a_len, const char *b, size_t b_len) {
    enum { MOST = 32 };
    if (a_len > MOST) a_len = MOST;
    if (b_len > MOST) b_len = MOST;
    /* Row i holds the distances between the first i letters of a and each beginning of b; three rows for the swap of neighbours. */
    unsigned rows[3][MOST + 1];
    for (unsigned j = 0; j <= b_len; j++) rows[0][j] = j;
    for (unsigned i = 1; i <= a_len; i++) {
        unsigned *row = rows[i % 3], *above = rows[(i + 2) % 3], *two_above = rows[(i + 1) % 3];
        row[0] = i;
        for (unsigned j = 1; j <= b_len; j++) {
            unsigned best = above[j - 1] + (a[i - 1] != b[j - 1]);
            if (above[j] + 1 < best) best = above[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && two_above[j - 2] + 1 < best) best = two_above[j - 2] + 1;
            row[j] = best;
        }
    }
    return rows[a_len % 3][b_len];
}

/* Distance for suggestions: a word that begins the other counts as one edit. Far = more than a third of the letters, at least 2. */
static unsigned distance(const char *word, size_t n, const char *known) {
    size_t m = strlen(known);
    if (n >= 3 && n < m && memcmp(word, known, n) == 0) return 1;
    unsigned d = cli_edit_distance(word, n, known, m), far = (unsigned)(n > m ? n : m) / 3 + 1;
    return d <= far && d < n ? d : 1000;
}

const char *cli_nearest_command(const char *word) {
    const char *best = NULL;
    unsigned least = 1000;
    for (size_t i = 0; i < cli_n_commands(); i++) {
        unsigned d = distance(word, strlen(word), commands[i].name);
        if (d < least) least = d, best = commands[i].name;
    }
    return best;
}

const char *cli_nearest_option(const char *word, size_t n, const cli_command *command) {
    const char *best = NULL;
    unsigned least = 1000;
    for (size_t i = 0; i < cli_n_options(); i++) {
        const cli_option *option = cli_option_at(i);
        if (!cli_option_applies(option, command)) continue;
        unsigned d = distance(word, n, option->name);
        if (d < least) least = d, best = option->name;
    }
    return best;
}
