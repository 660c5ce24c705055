use super::*;
use proptest::prelude::*;

fn sampler() -> Sampler {
    Sampler::new(&Cpu::new(1).unwrap())
}

#[test]
fn the_first_of_the_largest_logits_is_found_in_any_length() {
    let mut state = 7u32;
    for length in (1..70).chain([1023, 1024, 1025, 3000, 49_152]) {
        let logits: Vec<f32> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Few values, so that the largest comes more than once; some of them are none that could be chosen.
                [f32::NAN, f32::NEG_INFINITY, -1.5, -0.0, 0.0, 2.5, 2.5][(state >> 20) as usize % 7]
            })
            .collect();
        let mut expected = 0;
        for (at, logit) in logits.iter().enumerate() {
            if *logit > logits[expected] || logits[expected].is_nan() && !logit.is_nan() {
                expected = at;
            }
        }
        let is_number = logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
        let expected = if is_number { expected as u32 } else { 0 };
        assert_eq!(sampler().likeliest(&logits), expected, "{length}");
    }
}

fn choose(sampling: &Sampling, logits: &mut [f32], history: &History, position: usize) -> u32 {
    sampler().choose(sampling, logits, history, None, position).unwrap()
}

fn logits() -> Vec<f32> {
    (0..50).map(|i| ((i * 31 % 50) as f32) / 10.0).collect()
}

fn chosen(sampling: &Sampling, draws: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> =
        (0..draws).map(|p| choose(sampling, &mut logits(), &History::default(), p)).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn greedy_takes_the_likeliest_and_the_smaller_id_of_a_tie() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    assert_eq!(choose(&greedy, &mut [1.0, 3.0, 3.0, 2.0], &History::default(), 0), 1);
}

#[test]
fn top_k_top_p_and_min_p_keep_exactly_the_tokens_they_name() {
    let by_likelihood = {
        let mut ids: Vec<u32> = (0..50).collect();
        ids.sort_by(|a, b| logits()[*b as usize].total_cmp(&logits()[*a as usize]));
        ids
    };
    let expect = |count: usize| {
        let mut ids = by_likelihood[..count].to_vec();
        ids.sort_unstable();
        ids
    };
    assert_eq!(chosen(&Sampling { top_k: 3, ..Sampling::default() }, 2000), expect(3));
    // Weights fall by e^-0.1 a token: the first five hold 39.6 % of the total, the first six 45.4 %.
    assert_eq!(chosen(&Sampling { top_p: 0.42, ..Sampling::default() }, 4000), expect(6));
    assert_eq!(chosen(&Sampling { min_p: 0.75, ..Sampling::default() }, 2000), expect(3));
}

#[test]
fn draws_follow_the_distribution() {
    let sampling = Sampling { temperature: 0.7, seed: 11, ..Sampling::default() };
    let row = [0.0f32, 1.0, 2.0, -1.0];
    let mut counts = [0f64; 4];
    let draws = 40_000;
    for position in 0..draws {
        counts[choose(&sampling, &mut row.clone(), &History::default(), position) as usize] += 1.0;
    }
    let weights = row.map(|l| (f64::from(l) / 0.7).exp());
    let total: f64 = weights.iter().sum();
    for (count, weight) in counts.iter().zip(weights) {
        let p = weight / total;
        let deviation = (p * (1.0 - p) / draws as f64).sqrt();
        assert!((count / draws as f64 - p).abs() < 5.0 * deviation);
    }
}

#[test]
fn a_draw_is_a_function_of_seed_and_position() {
    let at = |seed, position| {
        choose(&Sampling { seed, ..Sampling::default() }, &mut logits(), &History::default(), position)
    };
    assert_eq!((at(5, 9), at(5, 9)), (at(5, 9), at(5, 9)));
    assert!((0..64).any(|p| at(5, p) != at(6, p)));
    assert!((0..64).any(|p| at(5, p) != at(5, p + 1)));
}

#[test]
fn penalties_count_the_prompt_and_the_output_as_each_is_defined() {
    let history = History::new(&[1], &[2, 2]);
    let after = |sampling: Sampling| {
        let mut row = [1.0f32, 2.0, 2.0, -2.0];
        choose(&sampling, &mut row, &history, 0);
        row
    };
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    assert_eq!(after(Sampling { repetition_penalty: 2.0, ..greedy.clone() }), [1.0, 1.0, 1.0, -2.0]);
    assert_eq!(after(Sampling { presence_penalty: 0.5, ..greedy.clone() }), [1.0, 2.0, 1.5, -2.0]);
    assert_eq!(after(Sampling { frequency_penalty: 0.5, ..greedy.clone() }), [1.0, 2.0, 1.0, -2.0]);
    assert_eq!(after(Sampling { logit_bias: vec![(3, 5.0)], ..greedy }), [1.0, 2.0, 2.0, 3.0]);
}

#[test]
fn log_probabilities_are_those_of_the_raw_softmax_best_first() {
    let got = sampler().logprobs(&[0.0, 2.0, 1.0], 0, 2);
    let total = (1f64 + 2f64.exp() + 1f64.exp()).ln();
    assert!((f64::from(got.logprob) + total).abs() < 1e-6);
    assert_eq!(got.top.iter().map(|(token, _)| *token).collect::<Vec<u32>>(), [1, 2]);
    assert!((f64::from(got.top[0].1) - (2.0 - total)).abs() < 1e-6);
}

/// The tokens that a draw may give with their probabilities, in order: as the settings are defined, in f64, the whole vocabulary sorted.
fn by_definition(sampling: &Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight =
        |logit: f32| ((f64::from(logit) - f64::from(largest)) / f64::from(sampling.temperature)).exp();
    let mut kept: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|logit| weight(*logit))).collect();
    kept.sort_by(|a, b| logits[b.0 as usize].total_cmp(&logits[a.0 as usize]).then(a.0.cmp(&b.0)));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
    }
    if sampling.top_p < 1.0 {
        let total: f64 = kept.iter().map(|it| it.1).sum();
        let mut sum = 0.0;
        let is_needed = |it: &&(u32, f64)| {
            let before = sum;
            sum += it.1;
            before < total * f64::from(sampling.top_p)
        };
        let count = kept.iter().take_while(is_needed).count();
        kept.truncate(count.max(1));
    }
    kept.retain(|it| it.1 >= f64::from(sampling.min_p));
    kept.sort_by_key(|it| it.0);
    let total: f64 = kept.iter().map(|it| it.1).sum();
    kept.iter().map(|(token, weight)| (*token, weight / total)).collect()
}

proptest! {
    #[test]
    fn a_draw_is_the_token_that_the_definition_has_at_that_place(
        seed in any::<u32>(),
        length in 1usize..2000,
        spread in 0.1f32..40.0,
        temperature in 0.05f32..3.0,
        top_k in prop_oneof![Just(0u32), 1u32..60, 60u32..3000],
        top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..0.9],
        masked in any::<bool>(),
        place in 0.0f64..1.0,
    ) {
        let mut state = seed;
        let logits: Vec<f32> = (0..length)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Of a few hundred values, so that some are equal.
                let value = (state >> 23) as f32 / 512.0 * spread - spread / 3.0;
                if masked && at % 3 == 1 { f32::NEG_INFINITY } else { value }
            })
            .collect();
        let sampling = Sampling { temperature, top_k, top_p, min_p, ..Sampling::default() };
        let expected = by_definition(&sampling, &logits);
        let mut sampler = sampler();
        let largest = logits[sampler.likeliest(&logits) as usize];
        let token = sampler.draw(&sampling, &logits, largest, place);
        // What rounds may move an interval's ends, and leave out or add a token whose end is the nucleus's.
        let mut end = 0.0;
        let around = expected.iter().any(|(known, probability)| {
            let begin = end;
            end += probability;
            *known == token && begin - 1e-4 <= place && place <= end + 1e-4
        });
        prop_assert!(around, "{token} at {place}, of {expected:?}");
    }

    #[test]
    fn log_probabilities_are_those_of_the_definition(seed in any::<u32>(), length in 1usize..2000, top in 0usize..25) {
        let mut state = seed;
        let logits: Vec<f32> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 20) as f32 / 128.0 - 16.0
            })
            .collect();
        let total = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        let mut order: Vec<u32> = (0..length as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let got = sampler().logprobs(&logits, length as u32 / 2, top);
        let close = |logprob: f32, token: u32| (f64::from(logprob) - (f64::from(logits[token as usize]) - total)).abs() < 1e-4;
        prop_assert!(close(got.logprob, length as u32 / 2));
        prop_assert_eq!(got.top.iter().map(|it| it.0).collect::<Vec<u32>>(), &order[..top.min(length)]);
        prop_assert!(got.top.iter().all(|(token, logprob)| close(*logprob, *token)));
    }
}

#[test]
fn the_smallest_temperature_takes_the_likeliest() {
    let sampling = Sampling { temperature: f32::MIN_POSITIVE / 8.0, ..Sampling::default() };
    let row = [1.0f32, 2.0, 3.0, 2.9999];
    assert!((0..50).all(|position| choose(&sampling, &mut row.clone(), &History::default(), position) == 2));
}
