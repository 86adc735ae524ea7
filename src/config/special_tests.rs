//! Values of keys with rules of their own.

use super::super::yaml;
use super::*;

fn read<T: Parse>(text: &str) -> Result<T, Vec<Mismatch>> {
    T::parse(&yaml::parse(text).expect("valid YAML"))
}

#[test]
fn target_modules_are_names_a_pattern_or_all_linear() {
    let names = |list: &[&str]| Ok(TargetModules(ModuleSet::Names(list.iter().map(|n| (*n).into()).collect())));
    for (text, list) in [
        ("[v_proj, q_proj]", &["q_proj", "v_proj"][..]),
        ("null", &["q_proj", "v_proj"]),
        ("q_proj", &["q_proj"]),
        ("[q_proj]", &["q_proj"]),
        ("\"v_proj,q_proj, up_proj\"", &["q_proj", "v_proj", "up_proj"]),
        ("[\"q_proj v_proj\"]", &["q_proj", "v_proj"]),
        ("[lm_head, embed_tokens, q_proj]", &["q_proj", "lm_head", "embed_tokens"]),
        (
            "[layers.1.mlp.up_proj, model.layers.0.self_attn.q_proj, o_proj]",
            &["o_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"],
        ),
        ("model.layers.0.self_attn.q_proj", &["model.layers.0.self_attn.q_proj"]),
    ] {
        assert_eq!(read(text), names(list), "{text}");
    }
    for text in ["all-linear", "[all-linear]", "ALL-LINEAR"] {
        assert_eq!(read(text), names(&TARGETS[..7]), "{text}");
    }
    for (text, pattern) in [
        ("'.*q_proj'", ".*q_proj"),
        ("['.*q_proj']", ".*q_proj"),
        (r"'model\.layers\.1\d\.self_attn\.(q|v)_proj'", r"model\.layers\.1\d\.self_attn\.(q|v)_proj"),
        (r"'(?!.*lm_head).*proj'", "(?!.*lm_head).*proj"),
    ] {
        assert_eq!(read(text), Ok(TargetModules(ModuleSet::Pattern(pattern.into()))), "{text}");
    }
    for (text, says) in [
        ("[q_proj, q_proj]", "once"),
        ("[]", "q_proj"),
        ("[q_proj, all-linear]", "stands alone"),
        ("[\".*q_proj\", v_proj]", "every text is a name"),
        ("'*.q_proj'", "whole module path"),
        ("[qproj]", "did you mean `q_proj`"),
        ("layers.1.qproj", "did you mean `q_proj`"),
    ] {
        let wrong = read::<TargetModules>(text).expect_err(text);
        assert!(wrong[0].help.as_ref().is_some_and(|help| help.contains(says)), "{text}: {wrong:?}");
    }
    assert_eq!(read::<TargetModules>("[a, b, q_proj]").expect_err("two unknown names").len(), 2);
}

#[test]
fn module_names_are_a_list_or_a_text() {
    let names = |list: &[&str]| Ok(ModuleNames(list.iter().map(|n| (*n).into()).collect()));
    for (text, list) in [
        ("null", &[][..]),
        ("[]", &[]),
        ("lm_head", &["lm_head"]),
        ("\"lm_head,embed_tokens\"", &["embed_tokens", "lm_head"]),
        ("[lm_head, embed_tokens, lm_head]", &["embed_tokens", "lm_head"]),
        ("[model.layers.0.input_layernorm]", &["model.layers.0.input_layernorm"]),
    ] {
        assert_eq!(read(text), names(list), "{text}");
    }
    assert!(read::<ModuleNames>("['.*norm']").is_err());
    assert!(read::<ModuleNames>("{a: b}").is_err());
}

#[test]
fn names_and_numbers_with_special_meanings() {
    assert_eq!(read("adamw_hf"), Ok(AdamW("adamw_hf")));
    for (text, bytes, is_paged) in [
        ("adamw_torch_fused", None, false),
        ("paged_adamw_32bit", None, true),
        ("paged_adamw_8bit", Some(2), true),
        ("adamw_bnb_8bit", Some(2), false),
        ("adamw_torch_4bit", Some(1), false),
    ] {
        let optim = read::<AdamW>(text).expect(text);
        assert_eq!((optim.promised_bytes(), optim.is_paged()), (bytes, is_paged), "{text}");
    }
    for text in ["adafactor", "galore_adamw", "stable_adamw", "lion_8bit", "schedule_free_adamw", "sgd"] {
        assert!(read::<AdamW>(text).is_err(), "{text}");
    }
    for text in ["none", "[]", "null", "[none]"] {
        assert_eq!(read(text), Ok(Sinks { sinks: vec![], trackers: vec![] }), "{text}");
    }
    let tensorboard = vec![ReportTo::Tensorboard];
    assert_eq!(read("[tensorboard]"), Ok(Sinks { sinks: tensorboard.clone(), trackers: vec![] }));
    for text in ["wandb", "[wandb]", "[wandb, tensorboard]"] {
        assert_eq!(read(text), Ok(Sinks { sinks: tensorboard.clone(), trackers: vec!["wandb"] }), "{text}");
    }
    assert_eq!(read("all"), Ok(Sinks { sinks: tensorboard, trackers: vec!["all"] }));
    for text in ["[none, tensorboard]", "wandbb", "{a: 1}", "[wandb, x]"] {
        assert!(read::<Sinks>(text).is_err(), "{text}");
    }
    for (text, cadence) in [("0.05", Cadence::Share(0.05)), ("1", Cadence::Steps(1)), ("1.0", Cadence::Steps(1))] {
        assert_eq!(read(text), Ok(cadence), "{text}");
    }
    assert!(read::<Cadence>("1.5").is_err() && read::<Cadence>("-0.5").is_err());
    assert_eq!(read("0"), Ok(EvalCadence(None)));
    for (text, count) in [("-1", 0), ("null", 0), ("0", 0), ("50", 50)] {
        assert_eq!(read(text), Ok(TopK(count)), "{text}");
        assert_eq!(read(text), Ok(Limit(Some(count).filter(|count| *count > 0))), "{text}");
    }
    assert!(read::<TopK>("-2").is_err() && read::<TopK>("0.5").is_err());
    assert_eq!(read("no"), Ok(Recurrence::No));
    assert_eq!(read("false"), Ok(Recurrence::No));
    assert!(read::<Recurrence>("best").is_err());
    assert_eq!(read("best"), Ok(Saving::Best));
    assert_eq!(read("false"), Ok(Saving::At(Recurrence::No)));
    assert!(read::<Saving>("better").is_err());
    assert_eq!(read("-1"), Ok(MaxSteps(None)));
    assert_eq!(read("20"), Ok(MaxSteps(Some(20))));
    assert!(read::<MaxSteps>("0").is_err());
    assert!(read::<MaxSteps>("-2").is_err());
    assert_eq!(read("true"), Ok(Resume::Latest));
    assert_eq!(read("~"), Ok(Resume::No));
    assert_eq!(read("auto"), Ok(Resume::Auto));
    assert_eq!(read("out/checkpoint-5"), Ok(Resume::Path("out/checkpoint-5".into())));
    assert_eq!(read("cuda:1"), Ok(DeviceChoice::Cuda(1)));
    assert!(read::<DeviceChoice>("gpu").is_err());
    assert_eq!(read("true"), Ok(ScaleRewards::Group));
    assert_eq!(read("none"), Ok(ScaleRewards::None));
    assert!(read::<ScaleRewards>("std").is_err());
}

#[test]
fn amounts_of_memory_are_numbers_with_or_without_a_unit() {
    for (text, bytes) in [
        ("11GB", 11_000_000_000),
        ("8GiB", 8 << 30),
        ("1.5 gib", 3 << 29),
        ("512MiB", 512 << 20),
        ("4e9", 4_000_000_000),
        ("8589934592", 8 << 30),
        ("7 B", 7),
    ] {
        assert_eq!(read(text), Ok(ByteCount(bytes)), "{text}");
    }
    for text in ["-1GB", "11 GX", "GB", "nan", "1e30", "[8GB]", "''"] {
        assert!(read::<ByteCount>(text).is_err(), "{text}");
    }
}
