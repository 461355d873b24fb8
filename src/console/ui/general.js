// Manage > System > General: what this Console is, and how long sessions last.

import { get, post } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { card, check, field, form, page, toast } from './parts.js';

function facts(values) {
  return h('dl', { class: 'facts' }, values.map(([name, value]) => [h('dt', {}, name), h('dd', {}, value)]));
}

export function open(root, { may }) {
  const state = { system: {}, logon: null };
  const save = async ({ minutes, strong }) => {
    const wanted = { ...state.logon, sessionTimeoutSec: Math.round(Number(minutes) * 60), strongPassword: strong === 'on' };
    await post('/settings/logon', wanted);
    state.logon = wanted;
    toast('Saved');
  };
  const logins = () => form('Save', save, [
    field('Minutes until a session ends', 'minutes', { type: 'number', min: 1, value: state.logon.sessionTimeoutSec / 60 }),
    check('Only strong passwords: 12 characters, upper and lower case, digit, special character, unlike the name', 'strong',
      state.logon.strongPassword),
  ]);
  function draw() {
    const { status } = live;
    const known = [
      ['Version', state.system.version ?? status?.version ?? '–'],
      ['This node', status?.name ?? '–'],
      ['Cluster', status?.cluster ?? '–'],
      ['High availability', state.system.haEnabled === false ? 'off' : 'on'],
    ];
    show(root, page('General', null, card('This Console', {}, facts(known)), state.logon && card('Logins', {}, logins())));
  }
  async function load() {
    try {
      state.system = await get('/settings/system');
      state.logon = may ? await get('/settings/logon') : null;
    } catch {
      // Shown is what is known.
    }
    draw();
  }
  draw();
  load();
}
