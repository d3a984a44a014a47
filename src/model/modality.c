/* Modality: the option, else metadata.json, else class names, else the weights' own metadata; in doubt unknown, never a guess.
 *
 * A pipeline's class says more than its denoiser's: AudioLDM uses the UNet class of Stable Diffusion. So a class that serves several modalities is not
 * in the tables, nor are video models, which are none of the four.
 */
#include <stdio.h>
#include <string.h>
#include <strings.h>

#include "base/error.h"
#include "model/internal.h"

static const char *const g_names[] = {"unknown", "text", "code", "image", "audio"};

const char *aq_modality_name(aq_modality modality) { return (unsigned)modality < sizeof g_names / sizeof *g_names ? g_names[modality] : "unknown"; }

aq_modality aq_modality_from_name(const char *name) {
    for (int i = AQ_MODALITY_TEXT; i <= AQ_MODALITY_AUDIO; i++)
        if (name && strcmp(name, g_names[i]) == 0) return (aq_modality)i;
    return AQ_MODALITY_UNKNOWN;
}

typedef enum match_kind { PREFIX, SUFFIX, INSIDE, WHOLE } match_kind;

/* In order: the first match decides. Compared without regard to case. */
static const struct {
    const char *text;
    match_kind kind;
    aq_modality modality;
} g_classes[] = {
    {"video", INSIDE, AQ_MODALITY_UNKNOWN},
    {"3d", INSIDE, AQ_MODALITY_UNKNOWN},
    {"audio", INSIDE, AQ_MODALITY_AUDIO},
    {"music", INSIDE, AQ_MODALITY_AUDIO},
    {"acestep", PREFIX, AQ_MODALITY_AUDIO},
    {"stable-audio", PREFIX, AQ_MODALITY_AUDIO},
    /* pipelines and architecture words of images */
    {"stablediffusion", PREFIX, AQ_MODALITY_IMAGE},
    {"stable-diffusion", PREFIX, AQ_MODALITY_IMAGE},
    {"flux", PREFIX, AQ_MODALITY_IMAGE},
    {"DiTPipeline", WHOLE, AQ_MODALITY_IMAGE},
    {"PixArt", PREFIX, AQ_MODALITY_IMAGE},
    {"HunyuanDiT", PREFIX, AQ_MODALITY_IMAGE},
    {"HunyuanImage", PREFIX, AQ_MODALITY_IMAGE},
    {"Kandinsky", PREFIX, AQ_MODALITY_IMAGE},
    {"Kolors", PREFIX, AQ_MODALITY_IMAGE},
    {"AuraFlow", PREFIX, AQ_MODALITY_IMAGE},
    {"Sana", PREFIX, AQ_MODALITY_IMAGE},
    {"Lumina", PREFIX, AQ_MODALITY_IMAGE},
    {"QwenImage", PREFIX, AQ_MODALITY_IMAGE},
    {"Chroma", PREFIX, AQ_MODALITY_IMAGE},
    {"CogView", PREFIX, AQ_MODALITY_IMAGE},
    {"HiDream", PREFIX, AQ_MODALITY_IMAGE},
    {"LatentConsistency", PREFIX, AQ_MODALITY_IMAGE},
    {"LDMTextToImage", PREFIX, AQ_MODALITY_IMAGE},
    {"OmniGen", PREFIX, AQ_MODALITY_IMAGE},
    {"ZImage", PREFIX, AQ_MODALITY_IMAGE},
    {"Bria", PREFIX, AQ_MODALITY_IMAGE},
    {"Wuerstchen", PREFIX, AQ_MODALITY_IMAGE},
    {"StableCascade", PREFIX, AQ_MODALITY_IMAGE},
    /* denoisers of images only */
    {"DiTTransformer2DModel", WHOLE, AQ_MODALITY_IMAGE},
    {"SD3Transformer2DModel", WHOLE, AQ_MODALITY_IMAGE},
    {"UVit2DModel", WHOLE, AQ_MODALITY_IMAGE},
    /* language models by diffusion; code before text, for its names are longer */
    {"DiffuCoder", PREFIX, AQ_MODALITY_CODE},
    {"DreamCoder", PREFIX, AQ_MODALITY_CODE},
    {"CodeDiffusion", PREFIX, AQ_MODALITY_CODE},
    {"StableDiffCoder", PREFIX, AQ_MODALITY_CODE},
    {"LLaDAModel", PREFIX, AQ_MODALITY_TEXT},
    {"LLaDAMoE", PREFIX, AQ_MODALITY_TEXT},
    {"LLaDA2", PREFIX, AQ_MODALITY_TEXT},
    {"llada", WHOLE, AQ_MODALITY_TEXT},
    {"DreamModel", WHOLE, AQ_MODALITY_TEXT},
    {"Dream", WHOLE, AQ_MODALITY_TEXT},
    {"DreamBaseModel", WHOLE, AQ_MODALITY_TEXT},
    {"MDLM", WHOLE, AQ_MODALITY_TEXT},
    {"MDLMForMaskedLM", WHOLE, AQ_MODALITY_TEXT},
    {"BD3LM", PREFIX, AQ_MODALITY_TEXT},
    {"SEDD", WHOLE, AQ_MODALITY_TEXT},
    {"DiffuLLaMA", PREFIX, AQ_MODALITY_TEXT},
    {"DiffuGPT", PREFIX, AQ_MODALITY_TEXT},
    {"ForCausalLM", SUFFIX, AQ_MODALITY_TEXT},
    {"ForMaskedLM", SUFFIX, AQ_MODALITY_TEXT},
};

static bool matches(const char *name, const char *text, match_kind kind) {
    size_t n = strlen(name), m = strlen(text);
    if (n < m) return false;
    if (kind == WHOLE) return strcasecmp(name, text) == 0;
    if (kind == PREFIX) return strncasecmp(name, text, m) == 0;
    if (kind == SUFFIX) return strcasecmp(name + n - m, text) == 0;
    for (size_t i = 0; i + m <= n; i++)
        if (strncasecmp(name + i, text, m) == 0) return true;
    return false;
}

static aq_modality modality_of_class(const char *name) {
    for (size_t i = 0; name && i < sizeof g_classes / sizeof *g_classes; i++)
        if (matches(name, g_classes[i].text, g_classes[i].kind)) return g_classes[i].modality;
    return AQ_MODALITY_UNKNOWN;
}

static bool found(aq_model *model, aq_modality modality, const char *format, const char *detail) {
    if (modality == AQ_MODALITY_UNKNOWN) return false;
    char escaped[128];
    model->modality = modality;
    snprintf(model->modality_source, sizeof model->modality_source, format, aq_escape(escaped, sizeof escaped, detail, strlen(detail)));
    return true;
}

/* metadata.json of a folder: a modality that is none of the four is an error, not a reason to look elsewhere. */
static aq_status from_metadata_file(aq_model *model, const char *dir, const aq_model_options *options, aq_error *err) {
    json_t *metadata;
    aq_status status = aq_config_load(&metadata, dir, "metadata.json", options, err);
    if (status != AQ_OK || !metadata) return status;
    const json_t *value = json_object_get(metadata, "modality");
    const char *name = json_string_value(value);
    if (value && !json_is_null(value) && !found(model, aq_modality_from_name(name), "%s", "metadata.json")) {
        char escaped[128], path[512];
        snprintf(path, sizeof path, "%s/metadata.json", dir);
        aq_escape(escaped, sizeof escaped, name ? name : "", name ? strlen(name) : 0);
        status = aq_fail_at(err, AQ_ERR_FORMAT, path, NULL, "modality is %s%s%s, expected 'text', 'code', 'image' or 'audio'", name ? "\"" : "",
                            name ? escaped : "no string", name ? "\"" : "");
    }
    json_decref(metadata);
    return status;
}

/* __metadata__ of the first file: "modality", or an architecture word. */
static bool from_weights(aq_model *model) {
    static const char *const keys[] = {"modality", "architecture", "modelspec.architecture"};
    const char *key, *value;
    for (int k = 0; k < 3; k++)
        for (size_t i = 0; aq_model_metadata(model, i, &key, &value); i++)
            if (strcmp(key, keys[k]) == 0 &&
                found(model, k == 0 ? aq_modality_from_name(value) : modality_of_class(value), "safetensors __metadata__ %s", keys[k]))
                return true;
    return false;
}

/* The class, else the model type when a transformers config names no class that is known. A diffusers class in doubt stays in doubt. */
static bool from_config(aq_model *model, const json_t *config, const char *format) {
    const char *name = json_string_value(json_object_get(config, "_class_name"));
    if (name) return found(model, modality_of_class(name), format, name);
    name = json_string_value(json_array_get(json_object_get(config, "architectures"), 0));
    if (name && found(model, modality_of_class(name), format, name)) return true;
    name = json_string_value(json_object_get(config, "model_type"));
    return name && found(model, modality_of_class(name), format, name);
}

aq_status aq_modality_detect(aq_model *model, const aq_model_options *options, aq_error *err) {
    if (found(model, options->modality, "%s", "option")) return AQ_OK;
    bool is_folder = strstr(model->format, "safetensors") == NULL;
    aq_status status = is_folder ? from_metadata_file(model, model->root, options, err) : AQ_OK;
    if (status != AQ_OK || model->modality != AQ_MODALITY_UNKNOWN) return status;
    if (is_folder && strcmp(model->root, model->weights_dir) != 0) status = from_metadata_file(model, model->weights_dir, options, err);
    if (status != AQ_OK || model->modality != AQ_MODALITY_UNKNOWN) return status;
    if (from_config(model, model->model_index, "model_index.json class %s") || from_config(model, model->config, "config.json class %s") || from_weights(model))
        return AQ_OK;
    if (!options->require_modality) return AQ_OK;
    aq_fail_at(err, AQ_ERR_FORMAT, model->path, NULL,
               "the modality cannot be told from metadata.json, class names or the weights' metadata; it is one of 'text', 'code', 'image', 'audio'");
    aq_hint(err, "give it with --modality, or in metadata.json as {\"modality\": \"image\"}");
    return AQ_ERR_FORMAT;
}
