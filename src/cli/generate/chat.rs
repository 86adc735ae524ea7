//! `trainer generate --interactive`: a conversation, line by line.
//!
//! Each line of standard input is a turn of the user; the answer is printed while it is drawn, and is a turn of the conversation
//! from then on. What a person is told besides (what ends an answer early, what was left out) goes to standard error, so that
//! standard output has the answers alone.

use std::io::{self, BufRead, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use signal_hook::consts::SIGINT;

use super::{Args, Prompts, report};
use crate::cli::Context;
use crate::data::StreamDecoder;
use crate::rollout::forward::EngineModel;
use crate::rollout::{self, Caller, Event, Finish, Request, Rollout};
use crate::train::session::Session;

/// Begins a new conversation.
const RESET: &str = "/reset";
/// Ends the program.
const EXIT: &str = "/exit";

/// A conversation with a model.
struct Chat<'a> {
    args: &'a Args,
    session: &'a Session,
    context: &'a Context,
    ctrl_c: CtrlC,
    rollout: Rollout,
    turns: Vec<Value>,
    /// Answers so far, which keeps their random numbers apart.
    answers: u64,
}

/// SIGINT: ends an answer that is being drawn, and the program while it waits for a line.
struct CtrlC {
    is_waiting: Arc<AtomicBool>,
    has_come: Arc<AtomicBool>,
}

impl CtrlC {
    fn listen() -> io::Result<Self> {
        let (is_waiting, has_come) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        signal_hook::flag::register_conditional_default(SIGINT, Arc::clone(&is_waiting))?;
        signal_hook::flag::register(SIGINT, Arc::clone(&has_come))?;
        Ok(Self { is_waiting, has_come })
    }

    /// What is done meanwhile ends, instead of the program.
    fn during<T>(&self, answer: impl FnOnce(&AtomicBool) -> T) -> T {
        self.has_come.store(false, Ordering::SeqCst);
        self.is_waiting.store(false, Ordering::SeqCst);
        let answered = answer(&self.has_come);
        self.is_waiting.store(true, Ordering::SeqCst);
        answered
    }
}

/// Answers line after line until the input ends or says so.
///
/// # Errors
/// If the input cannot be read, standard output was closed, or the model fails.
pub(super) fn run(args: &Args, session: &Session, context: &Context) -> anyhow::Result<()> {
    let rollout = args.rollout(session)?;
    let mut chat = Chat { args, session, context, ctrl_c: CtrlC::listen()?, rollout, turns: Vec::new(), answers: 0 };
    let mut input = io::stdin().lock();
    let has_person = input.is_terminal() && context.terminal.is_interactive();
    if has_person {
        context.print(&format!("{RESET} begins a new conversation, {EXIT} ends it, Ctrl-C ends an answer\n"))?;
    }
    loop {
        if has_person {
            context.print("> ")?;
        }
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let Ok(line) = std::str::from_utf8(&line) else {
            tracing::error!("the line is not UTF-8; it is left out");
            continue;
        };
        match line.trim() {
            "" => {}
            RESET => chat.turns.clear(),
            EXIT => return Ok(()),
            _ => chat.answer(line.trim_end_matches(['\r', '\n']))?,
        }
    }
}

impl Chat<'_> {
    /// Answers a message. One that leaves no room for an answer, or that the template refuses, is left out of the conversation.
    fn answer(&mut self, message: &str) -> anyhow::Result<()> {
        let room = self.session.engine.config().max_position_embeddings;
        self.turns.push(json!({"role": "user", "content": message}));
        let prompt_ids = match self.prompt_ids() {
            Ok(prompt_ids) if prompt_ids.len() < room => prompt_ids,
            other => {
                self.turns.pop();
                match other {
                    Ok(prompt_ids) => tracing::error!(
                        "the conversation has {} tokens with this message, and the model holds {room} with the answer; the \
                         message is left out: send a shorter one, or begin a new conversation with {RESET}",
                        prompt_ids.len()
                    ),
                    Err(error) => tracing::error!("{error}; the message is left out"),
                }
                return Ok(());
            }
        };
        let (tokens, finish) = self.draw(prompt_ids)?;
        if tokens.is_empty() {
            self.turns.pop();
            return Ok(());
        }
        match finish {
            None => tracing::warn!("the answer was ended by Ctrl-C"),
            Some(Finish::Length) if tokens.len() < self.args.max_new_tokens as usize => tracing::warn!(
                "the answer ends where the conversation has the {room} tokens that the model holds; begin a new one with {RESET}"
            ),
            Some(Finish::Length) => {
                tracing::warn!("the answer ends at {} tokens (`--max-new-tokens`)", tokens.len());
            }
            Some(Finish::Eos | Finish::StopString) => {}
        }
        let answer = self.session.tokenizer.decode(&tokens, true)?;
        self.turns.push(json!({"role": "assistant", "content": answer}));
        Ok(())
    }

    fn prompt_ids(&self) -> anyhow::Result<Vec<u32>> {
        let conversation = Prompts::given("--interactive", self.turns.clone().into());
        Ok(self.args.tokens(&conversation, self.session.text())?.concat())
    }

    /// Draws an answer and prints it meanwhile. Returns its tokens and why it ended, `None` if it was by Ctrl-C.
    fn draw(&mut self, prompt_ids: Vec<u32>) -> anyhow::Result<(Vec<u32>, Option<Finish>)> {
        let Self { args, session, context, rollout, ctrl_c, answers, .. } = self;
        let request = Request { sample_id: 0, prompt_ids, group: 0 };
        let (mut tokens, mut stream, mut trouble) = (Vec::new(), StreamDecoder::new(true), None);
        let mut on_event = |event: Event| {
            if let Event::Token { token, .. } = event {
                tokens.push(token);
                let text = stream.push(&session.tokenizer, token).map_err(anyhow::Error::from);
                trouble = trouble.take().or(text.and_then(|text| context.print(&text)).err());
            }
        };
        let mut model = EngineModel::new(&session.engine, true)?.recorded()?;
        let drawn = ctrl_c.during(|has_come| {
            let is_cancelled = || has_come.load(Ordering::SeqCst);
            let mut caller = Caller { on_event: &mut on_event, is_cancelled: &is_cancelled, detokenize: None };
            rollout.generate(&mut model, &[request], &args.sampling(), args.seed, *answers, &mut caller)
        });
        *answers += 1;
        if let Some(error) = trouble {
            return Err(error);
        }
        context.print(&format!("{}\n", stream.finish()))?;
        let finish = match drawn {
            Ok(completions) => completions.first().map(|completion| completion.finish),
            Err(rollout::Error::Cancelled { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        report(rollout.statistics());
        Ok((tokens, finish))
    }
}
