//! The events of a running turn: kept from the first on, so that whoever attaches gets all of them once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use dormouse_answer::AnswerFormat;
use dormouse_engine::TokenLogprob;
use tokio::sync::{mpsc, watch};

use crate::api::{TurnEvent, TurnEventBody};

pub(crate) struct Hub {
    pub session: String,
    pub turn: String,
    pub answer_format: AnswerFormat,
    /// Ends with its followers: nobody else waits for the turn.
    pub cancel_when_left: bool,
    /// Someone asked for the end, perhaps before the engine had the turn.
    cancelled: AtomicBool,
    state: Mutex<State>,
    /// True from the first output token (or the end) on.
    warm: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    events: Vec<TurnEvent>,
    followers: Vec<Follower>,
    over: bool,
    /// Someone has listened; before that nobody can have left.
    followed: bool,
}

/// Someone who listens, and the last event known to them: a turn that goes on after a crash tells its durable tokens
/// again, and then those that were told but not durable yet.
struct Follower {
    starting_after: Option<u64>,
    events: mpsc::UnboundedSender<TurnEvent>,
}

impl Follower {
    /// False when nobody listens any more. The end is told whatever is known: a failed turn may have told more than
    /// became durable, and then counts fewer events than its followers did.
    fn tell(&self, event: &TurnEvent) -> bool {
        let known = self.starting_after.is_some_and(|after| event.sequence_number <= after);
        match known && !event.body.is_failure() {
            true => !self.events.is_closed(),
            false => self.events.send(event.clone()).is_ok(),
        }
    }
}

impl Hub {
    pub fn new(session: &str, turn: &str, answer_format: AnswerFormat, cancel_when_left: bool) -> Hub {
        let hub = Hub {
            session: session.to_owned(),
            turn: turn.to_owned(),
            answer_format,
            cancel_when_left,
            cancelled: AtomicBool::new(false),
            state: Mutex::default(),
            warm: watch::Sender::new(false),
        };
        hub.publish(0, TurnEventBody::Created { session: session.to_owned(), turn: turn.to_owned() });
        hub
    }

    /// Says that the turn runs, and what the model thinks of its prompt.
    pub fn in_progress(&self, prompt: Vec<TokenLogprob>) -> TurnEventBody {
        TurnEventBody::InProgress { session: self.session.clone(), turn: self.turn.clone(), prompt }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between two lines below leaves at most an event unsent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody. The end of a turn that failed before its last tokens were committed comes after them all the
    /// same.
    pub fn publish(&self, sequence_number: u64, body: TurnEventBody) {
        let mut state = self.state();
        let next = state.events.last().map_or(0, |last| last.sequence_number + 1);
        debug_assert!(body.is_last() || sequence_number >= next, "event {sequence_number} after {next}");
        let sequence_number = sequence_number.max(next);
        let event = TurnEvent { sequence_number, body };
        state.followers.retain(|follower| follower.tell(&event));
        state.over |= event.body.is_last();
        if sequence_number > 1 && !*self.warm.borrow() {
            self.warm.send_replace(true);
        }
        state.events.push(event);
        if state.over {
            state.followers.clear();
        }
    }

    /// Ends all streams without a last event: the turn goes on after the next start.
    pub fn abandon(&self) {
        let mut state = self.state();
        state.over = true;
        state.followers.clear();
        self.warm.send_replace(true);
    }

    /// The text that no token made certain, once it is known that none follows. Nothing where more was told than became
    /// durable: then it was told already.
    pub fn publish_rest(&self, sequence_number: u64, rest: TurnEventBody) {
        if self.state().events.last().is_none_or(|last| last.sequence_number < sequence_number) {
            self.publish(sequence_number, rest);
        }
    }

    /// Everything after `starting_after` (from the start when None) and in any case a failure, then what follows.
    pub fn follow(&self, starting_after: Option<u64>) -> mpsc::UnboundedReceiver<TurnEvent> {
        // A follower that does not read holds at most the turn's own events.
        let (sender, events) = mpsc::unbounded_channel();
        let follower = Follower { starting_after, events: sender };
        let mut state = self.state();
        for event in &state.events {
            follower.tell(event);
        }
        state.followed = true;
        if !state.over {
            state.followers.push(follower);
        }
        events
    }

    /// Nobody listens any more.
    pub fn is_left(&self) -> bool {
        let mut state = self.state();
        state.followers.retain(|follower| !follower.events.is_closed());
        state.followed && !state.over && state.followers.is_empty()
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// The text so far.
    pub fn text(&self) -> String {
        let state = self.state();
        let delta = |event: &TurnEvent| match &event.body {
            TurnEventBody::Delta { delta, .. } => Some(delta.clone()),
            _ => None,
        };
        state.events.iter().filter_map(delta).collect()
    }

    pub fn warm(&self) -> watch::Receiver<bool> {
        self.warm.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Turn, TurnStatus, Usage};

    fn delta(text: &str) -> TurnEventBody {
        TurnEventBody::Delta { delta: text.into(), token: 5, logprob: None }
    }

    async fn numbers(mut events: mpsc::UnboundedReceiver<TurnEvent>) -> Vec<u64> {
        let mut numbers = Vec::new();
        while let Some(event) = events.recv().await {
            numbers.push(event.sequence_number);
        }
        numbers
    }

    #[tokio::test]
    async fn whoever_attaches_gets_each_event_after_the_given_one_exactly_once() {
        let hub = Hub::new("s", "t", AnswerFormat::default(), false);
        let first = hub.follow(None);
        hub.publish(1, hub.in_progress(Vec::new()));
        hub.publish(2, delta("a"));
        let late = hub.follow(Some(1));
        hub.publish(4, delta("b"));
        let later = hub.follow(Some(4));
        assert_eq!(hub.text(), "ab");
        hub.publish(7, delta("c"));
        hub.abandon();
        assert_eq!(numbers(first).await, [0, 1, 2, 4, 7]);
        assert_eq!(numbers(late).await, [2, 4, 7]);
        assert_eq!(numbers(later).await, [7]);
        assert_eq!(numbers(hub.follow(None)).await, [0, 1, 2, 4, 7]);
    }

    #[tokio::test]
    async fn what_a_follower_has_seen_is_not_told_again_when_it_is_computed_again() {
        let hub = Hub::new("s", "t", AnswerFormat::default(), false);
        let again = hub.follow(Some(4));
        for number in 2..7 {
            hub.publish(number, delta("x"));
        }
        hub.abandon();
        assert_eq!(numbers(again).await, [5, 6]);
    }

    #[tokio::test]
    async fn the_end_is_told_even_to_those_who_saw_higher_numbers() {
        let hub = Hub::new("s", "t", AnswerFormat::default(), false);
        let ahead = hub.follow(Some(40));
        hub.publish(2, delta("a"));
        hub.publish_rest(2, delta("told already"));
        hub.publish_rest(3, delta("b"));
        assert_eq!(hub.text(), "ab");
        let turn = Turn {
            id: "t".into(),
            object: "session.turn".into(),
            session: "s".into(),
            status: TurnStatus::Failed,
            background: false,
            created_at: 0,
            completed_at: None,
            finish_reason: None,
            error: None,
            error_code: None,
            output_text: "ab".into(),
            message: Default::default(),
            answer_format: Default::default(),
            usage: Usage::default(),
            dormouse: None,
        };
        hub.publish(4, TurnEventBody::Failed { turn: Box::new(turn) });
        assert_eq!(numbers(ahead).await, [4]);
        assert_eq!(numbers(hub.follow(Some(40))).await, [4]);
    }

    #[test]
    fn a_hub_is_left_when_its_last_follower_is_gone() {
        let hub = Hub::new("s", "t", AnswerFormat::default(), true);
        assert!(!hub.is_left());
        let (one, two) = (hub.follow(None), hub.follow(None));
        drop(one);
        assert!(!hub.is_left());
        drop(two);
        assert!(hub.is_left());
    }

    #[tokio::test]
    async fn others_may_wait_for_the_first_token() {
        let hub = Hub::new("s", "t", AnswerFormat::default(), false);
        let mut warm = hub.warm();
        assert!(!*warm.borrow());
        hub.publish(2, delta("a"));
        warm.wait_for(|warm| *warm).await.unwrap();
    }
}
