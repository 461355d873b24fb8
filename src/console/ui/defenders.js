// Defenders: the agents of other hosts, how to make a host one, and what follows from an absence. Must never withdraw
// one without a question.

import { get, list, part, post, remove } from './api.js';
import { only } from './defender-events.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, confirm, copyButton, field, form, page, table, toast, when } from './parts.js';
import { count, nothing, time } from './words.js';

const ROWS = 50;
// Milliseconds between two looks at the list while it is open.
const PACE = 5_000;
// Days before its end from which a certificate is shown as a problem: it should have been renewed long ago.
const SOON = 30;
// Who may let hosts become Defenders, and who may change what is watched and what an absence means.
const INSTALLERS = ['admin', 'operator', 'defenderManager'];
const OPERATORS = ['admin', 'operator'];
const EVENTS = '#/manage/defenders/events';
const COLUMNS = [
  ['Defender', 'user-column'], ['State', 'state-column'], ['Last there', 'time-column'], ['Version', 'word-column'],
  ['Certificate ends', 'time-column'], ['Changed', 'time-column'], ['', 'action-column'],
];
// How a Defender stands: the kind of its badge, and what the state means.
const STATES = {
  connected: ['good', ''],
  away: ['busy', 'not connected'],
  alert: ['bad', 'away for too long'],
  removed: ['asking', 'was away for so long that it has to be registered again'],
  withdrawn: ['asking', 'shut out'],
};
const NO_FILTER = { state: '', name: '', version: '' };

function badge(state) {
  const [kind, words] = STATES[state] ?? ['busy', ''];
  return [h('span', { class: `badge ${kind}` }, state), h('div', { class: 'quiet' }, words)];
}

function withdraw(defender, reload) {
  const content = [
    h('p', {}, `Its certificate is worth nothing from now on, and its key gets no other one. What ${defender.name} has told stays.`),
    h('p', { class: 'quiet' }, 'To let the host back in, delete its folder there and install it anew.'),
  ];
  return confirm(`Withdraw ${defender.name}?`, content, 'Withdraw', async () => {
    await remove(`/defenders/${part(defender.id)}`);
    toast(`${defender.name} is withdrawn`);
    await reload();
  }, { kind: 'danger' });
}

function row(defender, may, reload) {
  const { facts = {} } = defender;
  const named = (text) => `${text} ${defender.name}`;
  const about = [facts.hostname !== defender.name && facts.hostname, facts.system].filter(Boolean).join(', ');
  const ends = defender.certificateExpiration * 1000 - Date.now() < SOON * 86_400_000;
  const seen = () => {
    only({ id: defender.id, name: defender.name });
    window.location.hash = EVENTS;
  };
  return {
    key: defender.id,
    kind: defender.state === 'alert' ? 'row-down' : null,
    cells: [
      [h('strong', {}, defender.name), about && h('div', { class: 'quiet' }, about)],
      badge(defender.state),
      defender.connected ? [h('span', {}, 'now'), h('div', { class: 'quiet' }, defender.address)] : when(defender.lastSeen),
      [defender.version || '–', !defender.compatibleVersion && h('div', { class: 'problem' }, 'not compatible')],
      [when(defender.certificateExpiration), ends && h('div', { class: 'problem' }, 'soon')],
      when(defender.lastModified),
      h('div', { class: 'actions' },
        button('Events', seen, { kind: 'small', 'aria-label': named('Events of') }),
        may && defender.state !== 'withdrawn' && button('Withdraw', () => withdraw(defender, reload), { kind: 'small', 'aria-label': named('Withdraw') })),
    ],
  };
}

// The form that searches the list.
function searching(filter, search) {
  const states = [['', 'all that may connect'], ...Object.keys(STATES).map((state) => [state, state])];
  const options = states.map(([value, words]) => [value, words, value === filter.state]);
  return form('Search', search, h('div', { class: 'filter' },
    field('State', 'state', { options }),
    field('Name or host name', 'name', { maxlength: 128, autocomplete: 'off', spellcheck: 'false', value: filter.name }),
    field('Version', 'version', { maxlength: 64, autocomplete: 'off', spellcheck: 'false', value: filter.version })), { kind: 'plain' });
}

function installing(state, make) {
  const { line } = state;
  return [
    h('p', {}, 'Run one line as root on each host that is to become a Defender. It fetches the program from this Console, checks it, registers the host and starts the agent.'),
    h('div', { class: 'buttons' }, button(line ? 'Make another line' : 'Show the install line', make, { kind: line ? 'plain' : 'primary' })),
    line && h('div', { class: 'join-line', 'data-key': line.line },
      h('code', { id: 'install-line', tabindex: 0 }, line.line),
      copyButton(line.line, 'Copy'),
      h('p', { class: 'quiet' }, `It is valid until ${time(line.until)}, for as many hosts as run it. Whoever has it may register hosts: treat it as a password.`)),
  ];
}

// What follows from an absence, in hours.
function absence(settings, saved) {
  const save = async ({ alert, removal }) => {
    const seconds = (hours) => Math.round(Number(hours) * 3600);
    const set = await post('/settings/defenders', { alertSec: seconds(alert), removeSec: seconds(removal) });
    toast('Saved');
    saved(set);
  };
  const hours = (label, name, value, hint) => field(label, name, { type: 'number', min: 0, step: 'any', value: value / 3600, hint });
  return form('Save', save, [
    hours('Hours without a connection until an event tells of it', 'alert', settings.alertSec, 'The event goes to the webhooks, too. At least a quarter of an hour.'),
    hours('Hours until the Defender is removed', 'removal', settings.removeSec, 'It has to be registered again then. What it has told stays. 0: never.'),
  ]);
}

export function open(root, { user }) {
  const [installs, operates] = [INSTALLERS, OPERATORS].map((roles) => roles.includes(user.role));
  const state = { rows: null, total: 0, offset: 0, filter: NO_FILTER, settings: null, line: null, problem: null };
  let timer = 0;
  const search = async ({ state: standing, name, version }) => {
    state.filter = { state: standing, name: name.trim(), version: version.trim() };
    await load(0);
  };
  const make = async () => {
    try {
      state.line = await post('/defenders/install-script', {});
    } catch (error) {
      toast(error.message, 'bad');
    }
    draw();
    root.querySelector('#install-line')?.focus();
  };
  const saved = (settings) => {
    state.settings = settings;
    draw();
  };
  function draw() {
    const { rows, total, offset, filter, settings, problem } = state;
    const filtered = Object.values(filter).some(Boolean);
    const empty = problem ?? nothing(live.stale, rows, filtered ? 'No Defender is like that.' : 'There is no Defender yet.');
    const shown = rows ?? [];
    const pager = total > ROWS && h('div', { class: 'buttons pager' },
      button('Before', () => load(Math.max(0, offset - ROWS)), { disabled: offset === 0 }),
      h('span', { class: 'quiet' }, `${offset + 1} to ${offset + shown.length} of ${total}`),
      button('Next', () => load(offset + ROWS), { disabled: offset + shown.length >= total }));
    const summary = rows && !live.stale && h('p', { class: 'quiet', role: 'status' }, count(total, filtered ? 'Defender found' : 'Defender', filtered ? 'Defenders found' : 'Defenders'));
    show(root, page('Defenders', 'Agents on other hosts, which watch files and tell what changes.',
      card('All Defenders', {}, searching(filter, search), summary,
        table('Defenders', COLUMNS, shown.map((one) => row(one, installs, () => load(offset))), empty), pager),
      h('div', { class: 'columns' },
        installs && card('Install', {}, installing(state, make)),
        operates && settings && card('Absence', {}, absence(settings, saved)))));
  }
  async function load(offset) {
    clearTimeout(timer);
    const { filter } = state;
    const wanted = Object.entries(filter).filter(([, value]) => value).map(([name, value]) => `&${name}=${part(value)}`);
    try {
      const found = await list(`/defenders?offset=${offset}${wanted.join('')}`, ROWS);
      // Another search may have begun meanwhile.
      if (filter !== state.filter) return;
      Object.assign(state, { rows: found.rows, total: found.total, offset, problem: null });
      state.settings ??= await get('/settings/defenders');
    } catch (error) {
      state.problem = error.message;
    }
    if (!root.isConnected) return;
    draw();
    timer = setTimeout(() => (document.hidden || live.stale ? again() : load(state.offset)), PACE);
  }
  function again() {
    clearTimeout(timer);
    timer = setTimeout(() => (document.hidden || live.stale ? again() : load(state.offset)), PACE);
  }
  draw();
  load(0);
  return { draw, load: () => load(state.offset), close: () => clearTimeout(timer) };
}
