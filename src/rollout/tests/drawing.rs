//! Models that draw several tokens at a time.

use super::attention_model::AttentionModel;
use super::{SamplingSettings, VOCAB, assert_same, detokenize, requests, run, settings, with_pages};
use crate::rollout::{Caller, Completion, Error, Finish, Request, Rollout, RolloutSettings, Statistics};

fn drawn(
    settings: RolloutSettings,
    requests: &[Request],
    sampling: &SamplingSettings,
    mut model: AttentionModel,
) -> Result<(Vec<Completion>, Statistics, AttentionModel), Error> {
    let mut rollout = Rollout::new(settings)?;
    let mut caller = Caller { on_event: &mut |_| (), is_cancelled: &|| false, detokenize: Some(&detokenize) };
    let completions = rollout.generate(&mut model, requests, sampling, 5, 2, &mut caller)?;
    Ok((completions, rollout.statistics(), model))
}

fn model(most_steps: usize) -> AttentionModel {
    let mut model = AttentionModel::new(VOCAB);
    model.most_steps = most_steps;
    model
}

#[test]
fn completions_do_not_depend_on_who_draws_or_how_many_at_a_time() {
    let requests = requests(&[3, 17, 40, 90, 16], 4);
    let greedy = SamplingSettings { temperature: 0.0, ..SamplingSettings::default() };
    let stopped = SamplingSettings { stop_strings: vec!["><3".into(), "1><2".into()], ..SamplingSettings::default() };
    for sampling in [SamplingSettings::default(), greedy, stopped] {
        for pages in [11, 25, 1000] {
            let want = run(with_pages(pages), &requests, &sampling);
            for most_steps in [1, 3, 16] {
                let (got, statistics, model) =
                    drawn(with_pages(pages), &requests, &sampling, model(most_steps)).unwrap();
                let case = format!("{sampling:?}, {pages} pages, {most_steps} steps");
                assert_same(&got, &want.completions, &case);
                assert!(model.draws > 0, "{case}");
                assert_eq!(statistics.generated_tokens, want.statistics.generated_tokens, "{case}");
            }
        }
    }
}

#[test]
fn no_more_sequences_are_computed_at_a_time_than_a_model_wants() {
    let requests = requests(&[3, 17, 40], 4);
    let want = run(settings(), &requests, &SamplingSettings::default());
    let mut few = model(4);
    few.most_lanes = 3;
    let (got, _, few) = drawn(settings(), &requests, &SamplingSettings::default(), few).unwrap();
    assert_same(&got, &want.completions, "three at a time");
    assert_eq!((few.most_spans, want.model.most_spans > 3), (3, true));
}

#[test]
fn filters_and_penalties_are_the_host_s_whoever_draws() {
    let requests = requests(&[5, 20], 2);
    for sampling in [
        SamplingSettings { top_k: 5, ..SamplingSettings::default() },
        SamplingSettings { top_p: 0.9, ..SamplingSettings::default() },
        SamplingSettings { min_p: 0.1, ..SamplingSettings::default() },
        SamplingSettings { repetition_penalty: 1.2, ..SamplingSettings::default() },
        SamplingSettings { repetition_penalty: 1.2, temperature: 0.0, ..SamplingSettings::default() },
        SamplingSettings {
            repetition_penalty: 0.9,
            temperature: 0.6,
            top_k: 20,
            top_p: 0.95,
            min_p: 0.01,
            stop_strings: Vec::new(),
        },
    ] {
        for pages in [7, 1000] {
            let want = run(with_pages(pages), &requests, &sampling);
            for most_steps in [3, 16] {
                let (got, _, model) = drawn(with_pages(pages), &requests, &sampling, model(most_steps)).unwrap();
                let case = format!("{sampling:?}, {pages} pages, {most_steps} steps");
                assert_same(&got, &want.completions, &case);
                assert!(model.draws > 0, "{case}");
            }
        }
    }
}

#[test]
fn logits_that_are_no_numbers_end_a_draw_with_the_sample_and_the_position() {
    let mut model = model(8);
    model.poisoned_position = Some(9);
    let error = drawn(settings(), &requests(&[5], 1), &SamplingSettings::default(), model).err().unwrap().to_string();
    assert!(error.contains("a NaN or an infinity") && error.contains('5'), "{error}");
}

#[test]
fn a_model_that_can_draw_no_longer_costs_no_token_and_no_random_number() {
    let requests = requests(&[3, 17, 40, 16], 4);
    for sampling in [
        SamplingSettings::default(),
        SamplingSettings { repetition_penalty: 1.2, top_p: 0.9, ..SamplingSettings::default() },
    ] {
        for pages in [11, 1000] {
            let want = run(with_pages(pages), &requests, &sampling);
            for most_draws in [0, 1, 3] {
                let mut model = model(4);
                model.most_draws = most_draws;
                let (got, statistics, model) = drawn(with_pages(pages), &requests, &sampling, model).unwrap();
                let case = format!("{sampling:?}, {pages} pages, {most_draws} draws");
                assert_same(&got, &want.completions, &case);
                assert_eq!((model.draws, model.most_steps), (most_draws, 0), "{case}");
                assert_eq!(statistics.generated_tokens, want.statistics.generated_tokens, "{case}");
            }
        }
    }
}

/// A visit draws 16 tokens after the first one, which comes of the prompt.
#[test]
fn a_stop_string_across_two_visits_ends_the_completion_with_its_token() {
    let settings = RolloutSettings { eos_token_ids: vec![], ..settings() };
    let requests = requests(&[20, 5, 33], 4);
    let whole = run(settings.clone(), &requests, &SamplingSettings::default()).completions;
    let mut found = 0;
    for (request, whole) in requests.iter().zip(&whole) {
        // The end of the last token of a visit and the beginning of the next one.
        let text = detokenize(&whole.token_ids[16..18]);
        let stop = text[1..text.len() - 1].to_string();
        if detokenize(&whole.token_ids[..17]).contains(&stop) {
            continue;
        }
        found += 1;
        let sampling = SamplingSettings { stop_strings: vec![stop], ..SamplingSettings::default() };
        let one = std::slice::from_ref(request);
        let (got, _, model) = drawn(settings.clone(), one, &sampling, model(16)).unwrap();
        assert_eq!((&got[0].token_ids[..], got[0].finish), (&whole.token_ids[..18], Finish::StopString));
        assert_eq!((got[0].logprobs.len(), got[0].is_truncated(), model.draws), (18, false, 2));
        // At the last token allowed it is still a stop string, not a truncation; one less, and it is one.
        for (max_new_tokens, finish) in [(18, Finish::StopString), (17, Finish::Length)] {
            let settings = RolloutSettings { max_new_tokens, ..settings.clone() };
            let (got, ..) = drawn(settings, one, &sampling, self::model(16)).unwrap();
            assert_eq!((got[0].token_ids.len(), got[0].finish), (max_new_tokens, finish));
        }
    }
    assert!(found > 5, "the case is not varied enough");
}
