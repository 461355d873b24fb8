// Follows the stream of the PRIMARY's status. Owns the age of what is known, and the search for the new PRIMARY when
// the old one stops answering: through the same host name, with the same session.

import { HEADERS, send } from './api.js';

// The daemon sends a status at least every half second, so this much silence means that it is gone: a host that has
// lost its power says nothing. From then on, nothing is shown as the present state. All times here are in milliseconds.
const SILENCE = 2_000;
// How often the ages on the page are updated during silence.
const CLOCK = 250;
// How long one attempt to reach a PRIMARY may take, and the pause before the next. After a time-out the next attempt
// may take longer: where everything is slow, short ones would never be answered.
const KNOCK = 1_000;
const LONGEST_KNOCK = 6_000;
const PAUSE = 200;
const ANSWER = 3_000;
// Pause between two requests for the status, where there is no stream because the daemon has too many.
const POLL = 1_000;
const SAMPLES = 120;
const BRIEF = 2_000;
// Longest wait of a request for a PRIMARY.
const LONGEST = 30_000;

export const live = {
  // opening, live, searching, resting (the page is hidden) or off.
  phase: 'off',
  // The newest status, which is kept while the PRIMARY does not answer, and when it came, in milliseconds since 1970.
  status: null,
  asOf: 0,
  // No PRIMARY has said anything for a while: what is known is the state at `asOf`, and may have changed.
  stale: false,
  // Counts what was added to the history of the cluster.
  history: 0,
  // While searching: since when, by performance.now().
  lostAt: 0,
  // Whether the former PRIMARY said goodbye, as at a switchover.
  farewell: false,
  // The last interruption that this page has seen: { from, to, ms, changed }. `changed` is false if the same PRIMARY came back.
  takeover: null,
  // Transactions behind by member id, oldest first.
  lags: new Map(),
};

const subscribers = new Set();
let onExpired = () => {};
let controller = null;
// When the newest status came, or the page began to wait for one. By performance.now(), which a change of the time of
// day does not affect.
let heardAt = 0;
let clock = 0;

// Calls `listener` at every change, until the function that this returns is called.
export function subscribe(listener) {
  subscribers.add(listener);
  return () => subscribers.delete(listener);
}

function publish() {
  for (const subscriber of subscribers) {
    try {
      subscriber(live);
    } catch (error) {
      // A mistake in one part of the page must not keep it from following the cluster.
      reportError(error);
    }
  }
}

function enter(phase) {
  live.phase = phase;
  publish();
}

// When the page was last made visible, by performance.now().
let awakeAt = 0;

// Milliseconds since the PRIMARY was last heard from.
export const age = () => performance.now() - heardAt;

// Updates the ages during silence. This is what makes the page grey, and then normal again.
function count() {
  const stale = live.phase !== 'off' && age() >= SILENCE;
  const changed = stale !== live.stale;
  live.stale = stale;
  if (stale || changed) publish();
}

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function take(status) {
  live.status = status;
  live.asOf = Date.now();
  live.stale = false;
  heardAt = performance.now();
  const known = new Set();
  for (const member of status.members) {
    const samples = live.lags.get(member.id) ?? [];
    samples.push(member.state === 'DOWN' || member.state === 'UNKNOWN' ? null : member.lag);
    live.lags.set(member.id, samples.slice(-SAMPLES));
    known.add(member.id);
  }
  for (const id of live.lags.keys()) if (!known.has(id)) live.lags.delete(id);
}

function nameOf(status, id) {
  return status.members.find((member) => member.id === id)?.name;
}

// Reads events from a response. Returns the reason for its end, or undefined if it broke off.
async function follow(response, own) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  for (;;) {
    const alarm = setTimeout(() => own.abort(), SILENCE);
    const { done, value } = await reader.read().finally(() => clearTimeout(alarm));
    if (done) return undefined;
    const events = (buffer + value).split('\n\n');
    buffer = events.pop();
    for (const event of events) {
      const lines = event.split('\n');
      const data = lines.filter((line) => line.startsWith('data: ')).map((line) => line.slice(6)).join('\n');
      if (lines[0] === 'event: end') return data;
      if (lines[0] === 'event: history') {
        live.history += 1;
        publish();
      }
      if (lines[0] !== 'event: status') continue;
      take(JSON.parse(data));
      enter('live');
    }
  }
}

// Tries until some host answers, and then asks for its status. Returns false if the session has ended.
async function search() {
  const before = live.status;
  live.lostAt = Math.max(heardAt, awakeAt);
  enter('searching');
  let patience = KNOCK;
  while (live.phase === 'searching') {
    try {
      const ping = await fetch('/api/v1/_ping', { cache: 'no-store', signal: AbortSignal.timeout(patience) });
      if (ping.ok) {
        const response = await send('GET', '/high-availability', { limit: ANSWER });
        if (response.status === 401) return false;
        if (response.ok) {
          const status = await response.json();
          if (live.phase === 'searching') found(before, status);
          return true;
        }
      }
    } catch (error) {
      // Nobody answered: try again.
      if (error.name === 'TimeoutError') patience = Math.min(patience * 1.5, LONGEST_KNOCK);
    }
    publish();
    await wait(PAUSE);
  }
  return true;
}

function found(before, status) {
  const ms = performance.now() - live.lostAt;
  const changed = before && before.primary !== status.primary;
  // If the same PRIMARY was away for a moment only, that is no news.
  const news = before && (changed || ms > BRIEF);
  live.takeover = news && { from: nameOf(before, before.primary), to: status.name, ms, changed };
  live.farewell = false;
  take(status);
  enter('live');
}

async function poll(until) {
  while (performance.now() < until && live.phase !== 'off' && !document.hidden) {
    const response = await send('GET', '/high-availability', { limit: ANSWER });
    if (response.status === 401) return false;
    if (!response.ok) throw new Error('no status');
    const status = await response.json();
    if (live.phase === 'off') break;
    take(status);
    enter('live');
    await wait(POLL);
  }
  return true;
}

// Follows one stream to its end. Returns false if the session has ended.
async function listen() {
  // For this stream alone: a timer that is left over must not end the next one.
  const own = new AbortController();
  controller = own;
  const alarm = setTimeout(() => own.abort(), ANSWER);
  try {
    const options = { signal: own.signal, headers: HEADERS, cache: 'no-store', credentials: 'same-origin' };
    const response = await fetch('/api/v1/high-availability/stream', options);
    clearTimeout(alarm);
    if (response.status === 401) return false;
    if (response.status === 503) return await poll(performance.now() + 30_000);
    if (!response.ok) throw new Error(`status ${response.status}`);
    const end = await follow(response, own);
    if (end === 'renew') return true;
    live.farewell = end === 'closing';
  } catch {
    // It broke off, or nobody answered.
  } finally {
    clearTimeout(alarm);
    own.abort();
  }
  if (live.phase === 'off' || document.hidden) return true;
  return search();
}

async function run() {
  while (live.phase !== 'off') {
    if (document.hidden) {
      enter('resting');
      await new Promise((resolve) => document.addEventListener('visibilitychange', resolve, { once: true }));
      awakeAt = performance.now();
      continue;
    }
    if (!(await listen())) {
      stop();
      onExpired();
      return;
    }
  }
}

// Begins to follow. `expired` is called when the session has ended.
export function start(expired) {
  onExpired = expired;
  if (live.phase !== 'off') return;
  heardAt = performance.now();
  clock = setInterval(count, CLOCK);
  enter('opening');
  run();
}

export function stop() {
  clearInterval(clock);
  live.phase = 'off';
  live.stale = false;
  live.status = null;
  live.takeover = null;
  live.lags.clear();
  controller?.abort();
  publish();
}

// Ends the stream after a request without an answer: the stream may not have noticed yet that the PRIMARY is gone.
export function suspect() {
  if (live.phase === 'live') controller?.abort();
}

// Ends the stream, too. Resolves with true once a PRIMARY answers, or with false if none does within LONGEST.
export function recovered() {
  if (live.phase === 'off' || live.phase === 'opening') return Promise.resolve(false);
  suspect();
  return new Promise((resolve) => {
    let unsubscribe = () => {};
    const end = (value) => {
      unsubscribe();
      resolve(value);
    };
    const timer = setTimeout(() => end(false), LONGEST);
    unsubscribe = subscribe(() => {
      if (live.phase === 'searching') return;
      clearTimeout(timer);
      end(live.phase === 'live');
    });
  });
}

// Closes the message about the last change of the PRIMARY.
export function dismiss() {
  live.takeover = null;
  publish();
}

document.addEventListener('visibilitychange', () => {
  if (document.hidden) controller?.abort();
});
