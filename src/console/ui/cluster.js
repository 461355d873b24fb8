// Manage > System > High Availability: the cluster, live. Owns what is shown of a status, and when a button can be
// pressed. What the buttons do is in cluster-actions.js. Must never show an old state as if it were the present one.

import * as actions from './cluster-actions.js';
import { chart, picture } from './cluster-picture.js';
import { list } from './api.js';
import { h, show } from './dom.js';
import { age, live, subscribe } from './live.js';
import { announce, badge, button, card, copyButton, page, statusPages, table, toast, when } from './parts.js';
import { adding, isPool, pool, removeFromPool } from './pool.js';
import { ago, bytes, clock, count, lastContact, nothing, sizeOf, span, stateWords, time, tolerance } from './words.js';

// The roles that may have the join line.
const INSTALLERS = ['admin', 'operator', 'defenderManager'];
const EVENTS = 20;
// The API gives no more at once.
const MOST = 400;
// Milliseconds until a change of a state is in the history. The stream says when it is, but there may be no stream.
const WRITTEN = 2_500;
// Milliseconds for which a new join line may be missing from the status: one may have been on its way.
const ON_ITS_WAY = 3_000;

// Runs what a button without a dialog does, and shows its failure.
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    toast(error.message, 'bad');
  }
}

function headline(status, facts) {
  if (facts.complete && facts.survives > 0) return `Healthy: the cluster survives the loss of ${count(facts.survives, 'host')}.`;
  if (facts.paused) return 'Automatic takeover is paused: if the PRIMARY fails, nobody takes over.';
  if (status.members.length === 1) return 'There is no other host yet: if this one fails, the Console is down.';
  if (facts.survives > 0) return 'Fault tolerance is reduced: the cluster is not complete.';
  return 'No failure is tolerated at the moment: the loss of one more host stops the Console.';
}

// Shown instead of the banner: what is below is the last known state.
function past() {
  return h('div', { class: 'banner bad', 'data-key': 'banner', role: 'status' },
    h('strong', {}, 'Unknown: no PRIMARY answers.'),
    ` Below is the last known state, as of ${clock(live.asOf)}`, h('span', { 'aria-hidden': 'true' }, `, ${ago(age())}`), '.');
}

// Says what could happen next, and what to do.
function banner(status, now) {
  if (live.stale) return past();
  const facts = tolerance(status, now);
  const good = facts.complete && facts.survives > 0;
  const kind = good ? (status.warnings.length > 0 ? 'notice' : 'good') : status.members.length === 1 ? 'notice' : 'bad';
  const lines = status.warnings.map((warning) => h('li', {}, warning));
  return h(
    'div',
    { class: `banner ${kind}`, 'data-key': 'banner', role: 'status' },
    h('strong', {}, headline(status, facts)),
    lines.length > 0 && h('ul', {}, lines),
  );
}

function lagCell(member, status) {
  if (member.id === status.primary) return h('span', { class: 'quiet' }, '–');
  const size = member.lag_bytes === null || member.lag_bytes === undefined ? 'size unknown' : bytes(member.lag_bytes);
  const known = !live.stale && member.state !== 'DOWN' && member.state !== 'UNKNOWN';
  const text = (known || live.stale) && member.lag === 0 ? 'in step' : `${count(member.lag, 'transaction')}, ${size}`;
  return h(
    'div',
    { class: 'lag' },
    h('span', {}, known ? text : `last known: ${text}`),
    chart(live.lags.get(member.id) ?? []),
  );
}

function words(member) {
  const notes = [stateWords(member.state)];
  if (!member.voter && member.state !== 'STARTUP2') notes.push('no vote yet');
  if (member.full) notes.push('its disk is full');
  if (member.sync && member.sync.total > 0) {
    const percent = Math.floor((100 * member.sync.bytes) / member.sync.total);
    const had = member.sync.unchanged > 0 ? `, ${bytes(member.sync.unchanged)} were there` : '';
    notes.push(`${percent} % of ${bytes(member.sync.total)} copied${had}`);
  }
  return notes.join(' · ');
}

function nameCell(member, status) {
  const here = member.id === status.node && h('span', { class: 'quiet' }, ' this node');
  return h('span', { class: 'node-name' }, h('strong', {}, member.name), here);
}

function stateCell(member) {
  if (live.stale) return h('div', {}, badge('UNKNOWN'), h('div', { class: 'quiet' }, `was ${member.state} at ${clock(live.asOf)}`));
  if (member.state === 'DOWN') return h('div', {}, badge('DOWN'), h('span', {}, ' unavailable'));
  return h('div', {}, badge(member.state), h('div', { class: 'quiet' }, words(member)));
}

// When the PRIMARY last heard from a member. While the status is stale, the time since then is added.
function seen(member, status) {
  const here = member.id === status.node;
  if (!live.stale) return here ? h('span', { class: 'quiet' }, '–') : lastContact(member.last_contact_ms);
  const then = here ? 0 : member.last_contact_ms;
  return then === null || then === undefined ? 'never' : ago(then + age());
}

function memberRow(member, status, may) {
  const other = member.id !== status.primary;
  const label = `Remove ${member.name}`;
  const drop = () => (isPool(status) ? removeFromPool(member, status) : actions.removeMember(member));
  const cross = button('✕', drop, { kind: 'cross', 'aria-label': label, title: label });
  return {
    key: `member-${member.id}`,
    kind: live.stale ? null : `row-${member.state.toLowerCase()}`,
    cells: [
      nameCell(member, status),
      stateCell(member),
      h('span', { class: 'mono' }, member.address),
      member.version || '–',
      lagCell(member, status),
      seen(member, status),
      may && other ? cross : '',
    ],
  };
}

function requestRow(request, may) {
  const label = `Reject ${request.name}`;
  const cross = button('✕', () => actions.reject(request), { kind: 'cross', 'aria-label': label, title: label });
  const state = h(
    'div',
    {},
    badge('REQUEST_JOIN'),
    h('div', { class: 'quiet' }, `asking to join since ${time(request.at)}; waiting for APPLY`),
    h('div', { class: 'mono fingerprint' }, request.fingerprint),
  );
  const clock = Math.abs(request.clock_ms) > 1000 ? `clock ${span(Math.abs(request.clock_ms))} off` : '–';
  return {
    key: `request-${request.fingerprint}`,
    kind: 'row-request_join',
    cells: [
      h('strong', {}, request.name),
      state,
      h('span', { class: 'mono' }, `${request.address}:${request.port}`),
      request.version,
      clock,
      '–',
      may ? cross : '',
    ],
  };
}

const COLUMNS = [
  ['Node', 'name-column'], ['State', 'state-column'], ['Address', 'address-column'], ['Version'], ['Behind', 'lag-column'], ['Last contact'], ['', 'action-column'],
];

function nodes(status, { may, statusPort }) {
  const requests = status.membership.requests ?? [];
  const rows = [
    ...status.members.map((member) => memberRow(member, status, may)),
    ...requests.map((request) => requestRow(request, may)),
  ];
  const facts = `Epoch ${status.epoch}. A majority has every transaction up to entry ${status.committed.toLocaleString('en')} of the raft log.`;
  const pages = statusPages(status, statusPort);
  return card('Nodes', {}, table('Nodes', COLUMNS, rows, ''), h('p', { class: 'quiet foot' }, facts),
    pages && h('p', { class: 'quiet foot' }, 'Status pages, which also answer without a PRIMARY: ', pages));
}

const NUMERALS = ['no', 'one', 'two', 'three', 'four', 'five', 'six', 'seven'];

// Why APPLY cannot be pressed; null if it can.
function applyObstacle(status) {
  const members = status.members.length;
  const requests = (status.membership.requests ?? []).length;
  const { least, most } = sizeOf(status);
  const needed = least === most ? `${most}` : `${least} to ${most}`;
  const wanted = least === most ? `exactly ${NUMERALS[most]} hosts` : `${needed} hosts`;
  const sum = `${count(members, 'member')} + ${count(requests, 'request')} = ${members + requests}, and ${needed} are needed`;
  if (requests === 0 && members === most) return `The cluster is complete: it has ${most} members. Nobody else can join.`;
  const [missing, over] = [least - members - requests, members + requests - most];
  if (missing > 0) return `APPLY needs ${wanted}: ${sum}. Run the join line on ${missing} more.`;
  if (over > 0) return `APPLY needs ${wanted}: ${sum}. Reject ${over}.`;
  if (requests === 0) return 'No host is asking to join.';
  return null;
}

// The line that is shown, for as long as it is valid: until it is used, is revoked or expires.
function openLine(status, state, now) {
  const { line } = state;
  if (!line) return null;
  const open = line.until > now && (status.membership.invitations ?? []).some(({ hash }) => hash === line.id);
  line.seen ||= open;
  if (open || (line.until > now && !line.seen && performance.now() - line.at < ON_ITS_WAY)) return line;
  Object.assign(state, { line: null, closed: true });
  return null;
}

function joinLine(line) {
  return h(
    'div',
    { class: 'join-line', 'data-key': line.line },
    h('code', { id: 'join-line', tabindex: 0 }, line.line),
    copyButton(line.line, 'Copy'),
    h('p', { class: 'quiet' }, `Run it as a user who may use sudo. It is valid until ${time(line.until)}, or until APPLY.`),
  );
}

function joining(status, state, { may, user }, redraw) {
  if (live.stale) return card('Add hosts', {}, h('p', {}, 'Unknown: no PRIMARY answers. Hosts can join when there is one again.'));
  const requests = status.membership.requests ?? [];
  const obstacle = applyObstacle(status) ?? (may ? null : 'Only an Administrator can admit hosts.');
  const make = () => attempt(async () => {
    Object.assign(state, { line: { ...(await actions.joinLine()), at: performance.now() }, closed: false });
    redraw();
  });
  const open = openLine(status, state, Date.now() / 1000);
  const gone = 'The join line that was shown here is no longer valid: it was used or revoked, or it has expired.';
  const line = open ? joinLine(open) : state.closed && h('p', { class: 'quiet' }, gone);
  const step = (text, ...more) => h('li', {}, text, more);
  const complete = requests.length === 0 && status.members.length === sizeOf(status).most;
  const made = button(open ? 'Make a new join line' : 'Show the join line', make, { kind: open ? 'plain' : 'primary' });
  if (complete) return card('Add hosts', {}, h('p', {}, obstacle, ' To replace a host, remove it first (✕), then join another.'));
  const press = button('APPLY', () => actions.apply(requests), {
    kind: 'primary', disabled: obstacle !== null, id: 'apply', 'aria-describedby': 'apply-why',
  });
  return card(
    'Add hosts',
    {},
    h(
      'ol',
      { class: 'steps' },
      step('Run one line on each host that is to join.', line, INSTALLERS.includes(user.role) && h('div', { class: 'buttons' }, made)),
      step('Each of them appears above as REQUEST_JOIN. Compare the fingerprints.'),
      step('Admit them.', h('div', { class: 'buttons' }, press),
        h('p', { id: 'apply-why', class: 'quiet' }, obstacle ?? `Ready: ${count(requests.length, 'host is', 'hosts are')} asking to join.`)),
    ),
  );
}

function controls(status, now, may) {
  if (!may) return null;
  const paused = status.membership.pause && status.membership.pause.until > now;
  const ready = status.members.some((member) => member.state === 'SECONDARY' && member.voter);
  return h(
    'div',
    { class: 'buttons' },
    button('Switch over …', () => actions.switchover(status.members), {
      disabled: !ready, title: ready ? null : 'No other member is SECONDARY',
    }),
    paused
      ? button('Resume automatic takeover', () => attempt(actions.resume))
      : button('Pause automatic takeover …', () => actions.pause(status.name)),
  );
}

function overview(status, now, may) {
  const { stale } = live;
  const searching = stale || live.phase === 'searching';
  const text = searching ? `${status.name} was PRIMARY${stale ? ` at ${clock(live.asOf)}` : ''}` : `${status.name} is PRIMARY`;
  return card(
    'Overview',
    {},
    h('div', { class: 'overview' },
      picture(status, { searching, stale }),
      h('div', {},
        h('p', { class: 'large' }, text),
        h('p', { class: 'quiet' }, `Last change of its role: ${status.reason}`),
        controls(status, now, may))),
  );
}

function eventRow(event) {
  return {
    key: `event-${event.id}`,
    kind: `severity-${event.severity}`,
    cells: [
      when(event.time),
      event.node,
      event.sentence,
    ],
  };
}

function history(state) {
  const rows = (state.events ?? []).map(eventRow);
  const more = rows.length >= state.wanted && state.wanted < MOST && button('Show older events', state.more);
  const empty = state.eventsProblem ?? nothing(live.stale, state.events, 'Nothing has happened yet.');
  return card('History', {}, table('History', [['When', 'time-column'], ['Node', 'name-column'], ['What and why', 'wide-column']], rows, empty), more);
}

async function loadEvents(state, redraw, wanted = EVENTS) {
  try {
    const { rows } = await list('/high-availability/events', wanted);
    Object.assign(state, { events: rows, wanted, eventsProblem: null });
  } catch (error) {
    if (error.status !== 0) state.eventsProblem = error.status === 404 ? 'No history is kept yet.' : error.message;
  }
  redraw();
}

// Identifies a state of the cluster: when it changes, the history is loaded again.
function mark(status) {
  const members = status.members.map((member) => `${member.id} ${member.state}`).join();
  const { pause, requests } = status.membership;
  return [status.epoch, status.primary, members, pause?.until, requests?.length].join();
}

// Announces changes to people who cannot see them. Returns what to compare the next status with.
function speak(status, before) {
  const requests = (status.membership.requests ?? []).map((request) => [request.name, 'REQUEST_JOIN']);
  const states = new Map([...status.members.map((member) => [member.name, member.state]), ...requests]);
  const changes = [...states].filter(([name, state]) => before && before.get(name) !== state);
  if (changes.length > 0) announce(`${changes.map(([name, state]) => `${name} is ${state}`).join(', ')}.`);
  return states;
}

export function open(root, context) {
  const { may } = context;
  const state = { line: null, closed: false, events: null, wanted: EVENTS, eventsProblem: null, more: null };
  const marks = { status: '', history: live.history };
  let spoken = null;
  let timer = 0;
  const members = (status) => (isPool(status) ? [pool(status, may), adding(status, may)] : [joining(status, state, context, draw)]);
  const draw = () => {
    const { status } = live;
    const now = Date.now() / 1000;
    const parts = status
      ? [banner(status, now), overview(status, now, may), nodes(status, context), ...members(status), history(state)]
      : [h('p', { class: 'quiet' }, live.stale ? 'Unknown: no PRIMARY answers.' : 'Asking the PRIMARY …')];
    show(root, page('High Availability', null, parts));
  };
  state.more = () => loadEvents(state, draw, Math.min(MOST, state.wanted + 4 * EVENTS));
  const load = () => loadEvents(state, draw, state.wanted);
  const changed = () => {
    draw();
    if (!live.status || live.phase !== 'live' || live.stale) return;
    spoken = speak(live.status, spoken);
    const now = mark(live.status);
    if (marks.status === now && marks.history === live.history) return;
    if (marks.status !== now) {
      clearTimeout(timer);
      timer = setTimeout(load, WRITTEN);
    }
    Object.assign(marks, { status: now, history: live.history });
    load();
  };
  const unsubscribe = subscribe(changed);
  changed();
  const close = () => {
    unsubscribe();
    clearTimeout(timer);
  };
  return { load, close };
}
