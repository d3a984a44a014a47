/* The table of settings (see config.h): name, type, default, range and help of each, in the order of the constructor of DiffusionQuantConfig.
 *
 * Everything else works from this table: files, environment, command line, messages, the Python class and docs/configuration.md. A new setting is one entry.
 */
#include "pipeline/config_fields.h"

#include <math.h>

#define INF HUGE_VAL

static const int bit_widths[] = {2, 4, 8, 0};
static const int group_sizes[] = {32, 64, 128, 256, 0};
static const int activation_widths[] = {8, 16, 0};

/* Entries of the usual shapes. */
#define INT_RANGE(name, preset_, low, high, values, help)                                                                                                      \
    { {name, AQ_CONFIG_INT, false, values, help}, .preset = preset_, .min = low, .max = high }
#define FLOAT_RANGE(name, preset_, low, high, values, help)                                                                                                    \
    { {name, AQ_CONFIG_FLOAT, false, values, help}, .preset = preset_, .min = low, .max = high }
#define BOOL(name, preset_, help)                                                                                                                              \
    { {name, AQ_CONFIG_BOOL, false, "true or false", help}, .preset = preset_ }
#define ENUM(name, preset_, values, help)                                                                                                                      \
    { {name, AQ_CONFIG_ENUM, false, values, help}, .preset = preset_ }
#define LIST(name, check_, values, help)                                                                                                                       \
    { {name, AQ_CONFIG_STRING_LIST, false, values, help}, .preset = "[]", .check = check_ }

const aq_config_def aq_config_defs[] = {
    {{"bit_width", AQ_CONFIG_INT, false, "2, 4, or 8", "Bits per weight of the codes."}, .preset = "4", .label = "bit width", .allowed = bit_widths},
    {{"modality", AQ_CONFIG_ENUM, true, "'text', 'code', 'image', or 'audio'", "What the model makes; null: told from the model's files."}, .preset = "null"},
    {{"num_time_groups", AQ_CONFIG_INT, false, "between 1 and 100", "Groups of timesteps that share parameters, with calibration."},
     .preset = "10",
     .label = "number of time groups",
     .min = 1,
     .max = 100},
    {{"group_size", AQ_CONFIG_INT, false, "32, 64, 128, or 256", "Weights along the inputs that share a scale; \"row\": the whole row."},
     .preset = "128",
     .label = "group size",
     .allowed = group_sizes,
     .word = "row"},
    BOOL("enable_time_aware", "true", "Lets parameters depend on the group of timesteps, with calibration."),
    BOOL("enable_spatial", "true", "Lets channels be equalized and activations smoothed, with calibration."),
    {{"min_accuracy", AQ_CONFIG_FLOAT, false, "between 0.0 and 1.0",
      "Floor of the cosine similarity of each layer; a layer below it goes up the fallback ladder."},
     .preset = "0.85",
     .label = "accuracy threshold",
     .min = 0,
     .max = 1},
    INT_RANGE("calibration_samples", "128", 1, INF, "at least 1",
              "Kept for callers, changes nothing: statistics hold the rows that were recorded (calibrate(samples=...)); `calib synth`: samples to make."),
    {{"deployment_profile", AQ_CONFIG_ENUM, false, "'edge', 'local', or 'cloud'", "Profile; in a file it brings its values, which the other keys then change."},
     .preset = "\"local\"",
     .label = "deployment profile"},
    BOOL("fail_fast", "false", "Stops at the first layer below the floor instead of using more bits for it."),
    BOOL("enable_entropy_adaptation", "true", "Allows the planner to use a score that needs no data when there is no calibration."),
    BOOL("enable_transition_optimization", "false",
         "Smooths parameters at the boundaries of time groups: where scales jump by more than smoothness_threshold, the smaller side is raised over "
         "smoothing_window groups."),
    FLOAT_RANGE("markov_weight", "0.1", 0, INF, "at least 0", "Kept for callers, changes nothing: boundaries are smoothed in closed form."),
    FLOAT_RANGE("entropy_weight", "0.05", 0, INF, "at least 0", "Kept for callers, changes nothing: boundaries are smoothed in closed form."),
    {{"learning_rate", AQ_CONFIG_FLOAT, false, "above 0 and at most 1", "Kept for callers, changes nothing: boundaries are smoothed in closed form."},
     .preset = "0.01",
     .max = 1,
     .above_min = true},
    INT_RANGE("max_iterations", "50", 1, INF, "at least 1", "Kept for callers, changes nothing: boundaries are smoothed in closed form."),
    {{"convergence_threshold", AQ_CONFIG_FLOAT, false, "above 0", "Kept for callers, changes nothing: boundaries are smoothed in closed form."},
     .preset = "0.0001",
     .max = INF,
     .above_min = true},
    ENUM("beta_schedule", "\"linear\"", "'linear' or 'cosine'",
         "Noise schedule when the model folder has no scheduler configuration: what calibrate(scheduler=...) noises data by. A run has no use for it."),
    INT_RANGE("num_threads", "0", 0, INF, "at least 0", "Threads; 0: one per processor."),
    BOOL("enable_streaming", "true", "Works layer by layer; false allows more layers in flight within the memory limit."),
    {{"enable_memory_aware_scheduling", AQ_CONFIG_BOOL, false, "true or false", "Bounds what is in flight by max_memory_limit_mb."},
     .preset = "true",
     .env = "ENABLE_MEMORY_AWARE"},
    {{"max_memory_limit_mb", AQ_CONFIG_INT, true, "at least 1", "Bound of what is in flight, in MB of 2^20 bytes; null: half of what is free."},
     .preset = "null",
     .env = "MAX_MEMORY_MB",
     .min = 1,
     .max = INF},
    BOOL("enable_mixed_precision", "false", "Puts layer_bit_widths and the planner into force."),
    BOOL("skip_sensitive_layers", "false", "Keeps embeddings, norms, heads and the layers named below in 16 bit."),
    BOOL("enable_simd", "true", "Uses the kernels of this processor; false: the scalar ones, with the same bytes."),
    INT_RANGE("simd_threshold", "128", 0, INF, "at least 0", "Weights below which the scalar kernels are used."),

    LIST("sensitive_layer_names", NULL, "names", "Layers that skip_sensitive_layers keeps: tensor names, with or without .weight."),
    LIST("sensitive_layer_patterns", aq_config_check_regexes, "regular expressions", "The same by regular expressions, found anywhere in the name."),
    {{"layer_bit_widths", AQ_CONFIG_BITS_MAP, false, "names with 2, 4, 8, or 16", "Bits of single layers, 16: kept; needs enable_mixed_precision."},
     .preset = "{}",
     .check = aq_config_check_bits_map},
    {{"target_model_size_mb", AQ_CONFIG_FLOAT, true, "above 0", "Size budget of the result in MB; null: none."},
     .preset = "null",
     .max = INF,
     .above_min = true},
    BOOL("target_size_is_wish", "false", "The target size came with a profile: it is reported as met or not, and not enforced."),
    {{"calibration_path", AQ_CONFIG_STRING, true, "a path", "Calibration statistics (.aqcal); null: none."}, .preset = "null"},
    INT_RANGE("seed", "0", 0, INF, "at least 0", "Seed of what is drawn at random."),
    FLOAT_RANGE("smoothness_threshold", "0.3", 0, 1, "between 0.0 and 1.0", "Jump of the scale between time groups that counts as a violation."),
    INT_RANGE("smoothing_window", "5", 1, 20, "between 1 and 20", "Time groups over which a boundary is smoothed."),
    ENUM("smoothing_interpolation", "\"linear\"", "'linear', 'cubic', or 'sigmoid'", "Curve between the parameters of two time groups."),

    BOOL("symmetric", "false", "Fixes the zero point in the middle of the codes."),
    ENUM("params", "\"auto\"", "'auto', 'f16', 'f32', or 'two-level'",
         "Form of scale and offset; auto: two-level at 2 bits, else f16. Two-level uses groups of 256, and f16 at 8 bits."),
    ENUM("method", "\"auto\"", "'auto', 'rtn', 'search', 'gptq', or 'r2q'",
         "How codes and scales are chosen; auto: with calibration gptq, for text and code at 2 bits the better of it and r2q; else search."),
    ENUM("nonfinite", "\"error\"", "'error', 'keep', or 'zero'", "A layer with NaN or infinity: refuse it, keep it as it is, or take such values as 0."),
    LIST("include", aq_config_check_globs, "globs", "Quantizes matching tensors that would be kept."),
    LIST("exclude", aq_config_check_globs, "globs", "Keeps matching tensors as they are."),
    LIST("layer_overrides", aq_config_check_overrides, "GLOB=bits:N,group:N,params:WORD,method:WORD", "Settings of matching layers; the last match wins."),
    {{"sensitive_layer_score", AQ_CONFIG_FLOAT, true, "between 0.0 and 1.0",
      "Keeps the layers whose sensitivity, 0..1 over the model, is at least this; null: none is kept by its score."},
     .preset = "null",
     .max = 1},
    ENUM("sensitivity_method", "\"auto\"", "'auto', 'gradient', 'hessian', or 'variance'",
         "What sensitive_layer_score goes by; auto: gradients where the calibration has them, else its second moments, else the weights."),
    {{"fallback", AQ_CONFIG_INT_LIST, false, "rising numbers out of 2, 4, 8",
      "Ladder of bits for a layer below the floor, then 16 bit; empty: straight to 16 bit."},
     .preset = "[2,4,8]",
     .check = aq_config_check_fallback},

    ENUM("rotate", "\"none\"", "'none' or 'hadamard'", "Rotates the inputs of a layer where that lowers the error of its output; needs calibration."),
    ENUM("smooth", "\"auto\"", "'auto', 'none', or 'ditas'",
         "Equalizes input channels (DiTAS), with calibration; auto: for image and audio, where that lowers the error of the output; ditas: every layer."),
    BOOL("fold_equalization", "true",
         "Folds equalization into the operation before a layer (norm, adaLN modulation, linear layer) where the model's structure is known and that is no "
         "worse."),
    BOOL("bias_correction", "true",
         "Adds what the codes of a layer miss on average over the calibration to the layer's own bias, and makes the codes for what is left."),
    ENUM("temporal_aggregation", "\"max\"", "'max' or 'momentum'",
         "Range of an input over the groups of timesteps, for equalization: the largest, or a running average from noise to clean."),
    {{"aggregation_momentum", AQ_CONFIG_FLOAT, false, "at least 0 and below 1", "What that average keeps of the groups before."},
     .preset = "0.9",
     .max = 0.999999},
    {{"act_bits", AQ_CONFIG_INT, false, "8 or 16", "Bits of the inputs that layers are to run with; 8: parameters per group of timesteps are stored."},
     .preset = "16",
     .allowed = activation_widths},
    ENUM("time_weighting", "\"uniform\"", "'uniform' or 'balanced'",
         "How much each group of timesteps counts: uniform: by its inputs; balanced: each group's relative output error the same."),
    {{"damping", AQ_CONFIG_FLOAT, false, "above 0 and at most 1", "Fraction of the mean diagonal that gptq and r2q add to the Hessian."},
     .preset = "0.01",
     .max = 1,
     .above_min = true},
    ENUM("act_order", "\"balanced\"", "'balanced', 'energy', or 'inputs'",
         "Order in which gptq and r2q visit the inputs; balanced: what the others explain best comes last; energy: by falling energy; inputs: as they stand."),
    INT_RANGE("refine_sweeps", "3", 0, 100, "between 0 and 100", "Rounds that refine codes and scales after gptq and r2q."),
    {{"allow_bits", AQ_CONFIG_INT_LIST, false, "rising numbers out of 2, 4, 8, 16", "Widths that the planner may give to a layer; 16: kept."},
     .preset = "[2,4,8,16]",
     .check = aq_config_check_allowed},
    {{"target_bpw", AQ_CONFIG_FLOAT, true, "above 0", "Budget in bits per weight of the quantized layers, parameters counted; null: none."},
     .preset = "null",
     .max = INF,
     .above_min = true},
    {{"plan_path", AQ_CONFIG_STRING, true, "a path", "Plan to carry out: bits, group, parameters and method of each layer it names; null: none."},
     .preset = "null"},
};

const size_t aq_config_n_defs = sizeof aq_config_defs / sizeof *aq_config_defs;
_Static_assert(sizeof aq_config_defs / sizeof *aq_config_defs <= AQ_CONFIG_MAX_FIELDS, "values[] holds every field");
